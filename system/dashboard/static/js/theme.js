// Before the first paint: dark, light, or what the system has. A plain script, so that nothing flashes.
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => localStorage.getItem("theme") ?? "auto";
  const apply = () => {
    const dark = chosen() === "dark" || (chosen() === "auto" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    document.dispatchEvent(new Event("themechange"));
  };
  system.addEventListener("change", apply);
  window.theme = {
    chosen,
    next() {
      const names = ["auto", "dark", "light"];
      localStorage.setItem("theme", names[(names.indexOf(chosen()) + 1) % names.length]);
      apply();
    },
  };
  apply();
})();
