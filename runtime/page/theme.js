// Light or dark: what the system says, until the reader says otherwise. Runs before the first paint.
"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const stored = (action) => {
    try {
      return action(localStorage);
    } catch {
      return null; // storage is switched off; the choice lasts as long as the page
    }
  };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    root.classList.toggle("dark-mode", isDark()); // Swagger UI's name for it
    document.getElementById("theme")?.setAttribute("aria-pressed", String(isDark()));
  };
  const chosen = stored((storage) => storage.getItem("edgekd-theme"));
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  show();
  system.addEventListener("change", show);
  document.addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme").addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      stored((storage) => storage.setItem("edgekd-theme", root.dataset.theme));
      show();
    });
  });
})();
