// What the browser does by itself: the tab's secret token, its settings over a reload, pictures dropped or pasted anywhere on the page.
window.mosaic = {
  // The token and the settings of this tab, for the server's first answer.
  restore() {
    let token = sessionStorage.getItem("mosaic.token");
    if (!token) {
      const bytes = crypto.getRandomValues(new Uint8Array(24));
      token = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
      sessionStorage.setItem("mosaic.token", token);
    }
    return [token, sessionStorage.getItem("mosaic.settings") || ""];
  },
  remember(...values) {
    sessionStorage.setItem("mosaic.settings", JSON.stringify(values));
  },
  // Hands picture files to the upload field, as if they had been chosen there.
  give(files) {
    const input = document.querySelector("#m-drop input[type=file]");
    if (!input || !files.length) return;
    const transfer = new DataTransfer();
    files.forEach((file) => transfer.items.add(file));
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  },
};
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files || [])].filter((file) => file.type.startsWith("image/"));
  if (!files.length) return;
  event.preventDefault();
  window.mosaic.give(files);
});
// A drop beside the upload field would make the browser leave the page.
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  if (event.target.closest?.("#m-drop")) return;
  event.preventDefault();
  window.mosaic.give([...(event.dataTransfer?.files || [])]);
});
