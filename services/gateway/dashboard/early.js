// Runs before the first picture, so that it has the right colours already. No module: those wait.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("bkg.theme");
  } catch {
    // Storage may be forbidden; then the page looks as the system does.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
