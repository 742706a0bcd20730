// The theme switch: as the system has it, until someone chooses; the choice is kept where the browser allows it.
// Runs in the head, before anything is painted.
"use strict";
(() => {
  const KEY = "moe-bias-theme";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem(KEY); } catch { /* a page from a file may have no storage: nothing is kept */ }

  function show() {
    const theme = chosen ?? (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    const button = document.querySelector(".theme");
    if (button) button.textContent = theme === "dark" ? "Light theme" : "Dark theme";
  }

  function change() {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem(KEY, chosen); } catch { /* as above */ }
    show();
  }

  dark.addEventListener("change", show);
  document.addEventListener("DOMContentLoaded", () => {
    document.querySelector(".theme").addEventListener("click", change);
    show();
  });
  show();
})();
