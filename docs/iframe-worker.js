// Browsers start no workers for pages that are opened from a folder. There, a hidden frame does what the worker of the
// search would. The plugin `offline` of the theme looks for this file's name, and else takes one from the network.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = "<!doctype html>"
      this.started = new Promise(done => this.frame.addEventListener("load", () => this.start(url, done), {once: true}))
      document.body.append(this.frame)
    }

    start(url, done) {
      const inside = this.frame.contentWindow
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
      const script = inside.document.createElement("script")
      script.addEventListener("load", () => done(inside))
      script.src = url
      inside.document.head.append(script)
    }

    postMessage(data) {
      this.started.then(inside => inside.dispatchEvent(new MessageEvent("message", {data})))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
