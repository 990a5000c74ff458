// The figures that the page measures of itself.

const ms = (value) => (value === null ? "–" : `${Math.round(value)} ms`);

/** Writes the figures of a visit into a definition list. */
export function showFigures(list, { player, times }) {
  const figures = player.figures(performance.now());
  const rows = [
    ["Frames per second", figures.fps.toFixed(1)],
    ["Time to first frame", ms(times.firstFrameMs)],
    ["Speech to picture", ms(times.latencyMs)],
    ["Lip sync, mean", `${figures.syncMeanMs.toFixed(1)} ms`],
    ["Lip sync, 95 %", `${figures.syncP95Ms.toFixed(1)} ms`],
    ["Buffer", `${ms(figures.bufferMs)} (target ${ms(figures.targetMs)})`],
    ["Late blocks", figures.late],
    ["Frames of silence left out", figures.skipped],
    ["Frames not drawn", figures.undrawn],
  ];
  list.replaceChildren(
    ...rows.flatMap(([name, value]) => [
      Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: value }),
    ]),
  );
}
