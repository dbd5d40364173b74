/* Receives responses that Gradio would leave waiting.

Gradio's server closes a page's event stream when no event is pending. A page that sends another event before it has read this
believes that the stream is open, and waits for the response until a later event opens a new stream. In this case, the hidden
button of `webui/event_streams.py` is clicked, whose event opens a new stream. */
() => {
  const DELAY = 100;
  const COMPLETED = /^data: \{"msg":"process_completed","event_id":"([^"]+)"/;
  const original = window.fetch;
  const pending = new Set();
  let openStreams = 0;

  async function addEvent(response) {
    const { event_id } = await response.json();
    if (event_id) pending.add(event_id);
  }

  async function readStream(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines) pending.delete(line.match(COMPLETED)?.[1]);
    }
  }

  function reopen() {
    if (openStreams > 0 || pending.size === 0) return;
    // Each event is waited for once: a cancelled one has no response.
    pending.clear();
    document.querySelector("#reopen-event-stream")?.click();
  }

  window.fetch = async (resource, options) => {
    const url = resource instanceof Request ? resource.url : String(resource);
    if (url.includes("/gradio_api/queue/join")) {
      const response = await original(resource, options);
      if (response.ok) await addEvent(response.clone());
      return response;
    }
    if (!url.includes("/gradio_api/queue/data")) return original(resource, options);
    openStreams += 1;
    const ended = () => {
      openStreams -= 1;
      setTimeout(reopen, DELAY);
    };
    try {
      const response = await original(resource, options);
      // The page aborts the request when it has read that the stream is closed.
      readStream(response.clone()).catch(() => {}).finally(ended);
      return response;
    } catch (error) {
      ended();
      throw error;
    }
  };
}
