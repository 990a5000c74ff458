"""A voice agent of LiveKit Agents with a face.

    pip install 'live-avatar-client[livekit]'
    export LIVEKIT_URL=... LIVEKIT_API_KEY=... LIVEKIT_API_SECRET=...
    export AVATAR_URL=localhost:8001 AVATAR_IMAGE=person.png
    python livekit_agent.py dev

The models that listen, think and speak are those of LiveKit's inference; plugins may take their place.
"""

import logging
import os
from typing import Any

from livekit import rtc
from livekit.agents import Agent, AgentServer, AgentSession, ErrorEvent, JobContext, cli

from live_avatar_client.livekit import AvatarWorker

logger = logging.getLogger("livekit_agent")
server = AgentServer()


async def give_face(session: AgentSession[Any], room: rtc.Room) -> AvatarWorker:
    """Connect an avatar that speaks what the session says; to be called before the session's start."""
    avatar = AvatarWorker(
        os.environ.get("AVATAR_URL", "localhost:8001"),
        image=os.environ["AVATAR_IMAGE"],
        prompt="A person talks to the camera.",
        label="AI-generated",
        api_key=os.environ.get("AVATAR_API_KEY"),
    )

    @session.on("error")
    def on_error(event: ErrorEvent) -> None:
        if event.source is avatar:
            logger.error("the face is lost, the voice is not: %s", event.error)

    await avatar.start(room, session)
    return avatar


@server.rtc_session()
async def entrypoint(ctx: JobContext) -> None:
    """Talk with whoever is in the room."""
    session: AgentSession[Any] = AgentSession(stt="deepgram/nova-3", llm="openai/gpt-4.1-mini", tts="cartesia/sonic-3")
    avatar = await give_face(session, ctx.room)
    ctx.add_shutdown_callback(avatar.aclose)
    await session.start(Agent(instructions="You are a friendly guide. Answer in one or two sentences."), room=ctx.room)
    await session.generate_reply(instructions="Greet the user.")


if __name__ == "__main__":
    cli.run_app(server)
