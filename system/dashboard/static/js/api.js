// The server's answers, and the stream that says when there is something new.

async function ask(path, query) {
  const answer = await fetch(`/api/${path}?${new URLSearchParams(query)}`);
  if (!answer.ok) throw new Error(`${answer.status}: ${(await answer.text()).slice(0, 300)}`);
  return answer.json();
}

export const runs = () => ask("runs", {});
export const overview = (run) => ask("overview", { run });
export const ranks = (run) => ask("ranks", { run });
export const evaluation = (run) => ask("evaluation", { run });
export const events = (run, name) => ask("events", name ? { run, name } : { run });

export function curves(run, scalars, range, points) {
  const window = range ? { from: Math.max(0, Math.floor(range[0])), to: Math.ceil(range[1]) } : {};
  return ask("curves", { run, scalars: scalars.join(","), points, ...window });
}

// Calls changed({version, read, problem}) for every change; the browser opens a lost stream again by itself.
export function follow(run, changed, lost) {
  const source = new EventSource(`/api/stream?${new URLSearchParams({ run })}`);
  source.onmessage = (message) => changed(JSON.parse(message.data));
  source.onerror = lost;
  return () => source.close();
}
