"""What the web server may do, and for whom; checked before it listens."""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..address import is_loopback, parse_url
from ..errors import InvalidInput
from ..tls import TLS

if TYPE_CHECKING:
    from ..credentials import ContentCredentials

DEFAULT_PORT: Final = 8080
DEFAULT_VOICE: Final = "en-us"
MIN_KEY_CHARS: Final = 16


@dataclass(frozen=True)
class TextToSpeech:
    """An OpenAI-compatible endpoint: `url` is that of `/v1/audio/speech`."""

    url: str
    model: str = "tts-1"
    voice: str = "alloy"
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise InvalidInput(f"the speech endpoint {self.url!r} is not http:// or https://; pass its whole address")


@dataclass(frozen=True)
class WebOptions:
    """The options of the web server; raises InvalidInput for those that do not go together."""

    url: str
    """`host:port` of the avatar's server."""
    api_key: str | None = field(default=None, repr=False)
    """The avatar's server asks for it; no visitor sees it."""
    tls: TLS | None = None
    """Certificates of the connection to the avatar's server."""
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    """0 takes a free one."""
    certificate: str | os.PathLike[str] | None = None
    """The web server's own certificate (PEM); pages are then served with TLS."""
    certificate_key: str | os.PathLike[str] | None = None
    visitor_key: str | None = field(default=None, repr=False)
    """What a visitor must know."""
    origins: tuple[str, ...] = ()
    """Origins of pages beside the server's own, such as that of a proxy: `https://name`."""
    portraits: Mapping[str, Path] = field(default_factory=dict)
    """Pictures to choose from, by name; the first is the page's first choice."""
    sessions_per_address: int = 4
    voice: str = DEFAULT_VOICE
    """espeak-ng's voice of typed text."""
    text_to_speech: TextToSpeech | None = None
    """Speaks typed text instead of espeak-ng."""
    credentials: "ContentCredentials | None" = field(default=None, repr=False)
    """Sign recordings."""

    def __post_init__(self) -> None:
        parse_url(self.url)
        if (self.certificate is None) != (self.certificate_key is None):
            raise InvalidInput("the web server has a certificate without a key, or a key without one; pass both")
        if self.visitor_key is not None and len(self.visitor_key) < MIN_KEY_CHARS:
            raise InvalidInput(
                f"the visitors' key has {len(self.visitor_key)} characters; pass at least {MIN_KEY_CHARS}"
            )
        if self.sessions_per_address < 1:
            raise InvalidInput(f"sessions_per_address is {self.sessions_per_address}; pass at least 1")
        for origin in self.origins:
            if not origin.startswith("https://") or origin.count("/") != 2:
                raise InvalidInput(f"the origin {origin!r} is not https://name; pass the address of the page's site")
        self._require_protection()

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(f"[{self.host}]:1" if ":" in self.host else f"{self.host}:1") and not self.origins

    @property
    def scheme(self) -> str:
        return "http" if self.certificate is None else "https"

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return the TLS settings of the pages; raise InvalidInput for files that cannot be used."""
        if self.certificate is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certificate, self.certificate_key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidInput(
                f"the certificate {os.fspath(self.certificate)!r} and its key cannot be used: "
                f"{error.strerror or error}; pass a PEM file with the certificate and one with its private key"
            ) from error
        return context

    def _require_protection(self) -> None:
        """Refuse to serve others without TLS and a key. A proxy in front of the server has its own TLS."""
        if self.is_local:
            return
        if self.certificate is None and not self.origins:
            raise InvalidInput(
                f"the web server would listen on {self.host} without TLS, and browsers give the microphone to pages "
                "with TLS only; pass a certificate and its key, or listen on 127.0.0.1"
            )
        if self.visitor_key is None:
            raise InvalidInput(
                f"everybody who reaches {self.origins[0] if self.origins else self.host} could use the avatar; pass a "
                "key for visitors, or listen on 127.0.0.1"
            )
