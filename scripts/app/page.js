// What the browser does by itself: the tab's secret token, its settings over a reload, pictures dropped or pasted anywhere on the page.
const tabs = new BroadcastChannel("mosaic");
const tab = crypto.getRandomValues(new Uint32Array(4)).join();
let own = null; // the token, once it is known that no other tab has it
let wanted = null; // until then
let taken = false;
tabs.onmessage = ({ data }) => {
  // of two that ask together, as when a browser opens its last tabs again, one gives way
  if (data.asks && (data.token === own || (data.token === wanted && tab < data.asks))) tabs.postMessage({ to: data.asks });
  if (data.to === tab) taken = true;
};
window.mosaic = {
  // The token and the settings of this tab, for the server's first answer. A duplicated tab has the token of the first one: it asks for it,
  // and if that one answers, it makes its own, and says whose references it begins with.
  async restore() {
    let token = sessionStorage.getItem("mosaic.token");
    let origin = "";
    if (token && token !== own) {
      wanted = token;
      tabs.postMessage({ asks: tab, token });
      await new Promise((done) => setTimeout(done, 250));
      wanted = null;
      if (taken) [origin, token] = [token, null];
    }
    if (!token) {
      const bytes = crypto.getRandomValues(new Uint8Array(24));
      token = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
      sessionStorage.setItem("mosaic.token", token);
    }
    own = token;
    return [token, sessionStorage.getItem("mosaic.settings") || "", origin];
  },
  remember(...values) {
    sessionStorage.setItem("mosaic.settings", JSON.stringify(values));
    this.mended(true);
  },
  // Until then a click may come before the token.
  opened: () => document.documentElement.toggleAttribute("data-opened", true),
  // Once something was changed, what was said against it is hidden until the next answer: it may be mended. Gradio's own way, an empty
  // status, sets fields back that have just been shown.
  mended: (yes) => document.documentElement.toggleAttribute("data-mended", yes),
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
