// Sets the theme before anything is drawn: the reader's choice, or that of the system.
(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("js");
  let choice = "auto";
  try {
    choice = localStorage.getItem("miles-theme") || "auto";
  } catch (error) {
    // A browser may keep nothing for a local file.
  }
  root.dataset.theme = ["light", "dark"].includes(choice) ? choice : "auto";
})();
