// Numbers, times and sizes as people read them.

export const DASH = "–";
const known = (value) => typeof value === "number" && Number.isFinite(value);

export const whole = (value) => (known(value) ? Math.round(value).toLocaleString("en-US") : DASH);

export function number(value) {
  if (!known(value)) return DASH;
  const size = Math.abs(value);
  if (size >= 1000) return value.toLocaleString("en-US", { maximumFractionDigits: size < 1e4 ? 1 : 0 });
  if (size !== 0 && size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

export const percent = (share) => (known(share) ? `${(100 * share).toFixed(share < 0.0995 ? 2 : 1)} %` : DASH);

export function duration(seconds) {
  if (!known(seconds)) return DASH;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

export function bytes(value) {
  if (!known(value)) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${unit ? value.toFixed(1) : value} ${units[unit]}`;
}

export const utc = (seconds) => (known(seconds) ? new Date(1000 * seconds).toISOString().slice(0, 19).replace("T", " ") : DASH);

export const plain = (value) => (known(value) ? number(value) : typeof value === "object" ? JSON.stringify(value) : String(value));
