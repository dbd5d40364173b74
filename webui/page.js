/* What the page does beside Gradio: it looks for changes of runs, shows what is running, keeps the address up to date, notifies, and
reopens event streams. It is in the head, so that no event comes before it. The hidden buttons that it clicks, and the listeners that
call `window.noraVision`, are in `webui/page.py`. */
(() => {
  const ACTIVE_MS = 2000, IDLE_MS = 10000, ANSWER_MS = 1500, BUSY_MS = 600, REOPEN_MS = 100, CLOSE_MS = 1000, MAX_TRIES = 3;
  // These screens are refreshed so often while a run goes on. The others are refreshed when the state of a run changes.
  const REFRESH_MS = 10000, FOLLOWING = ["train", "judge", "runs", "classify", "use", "arena"];
  // The page's own, which is not read yet.
  let pageTitle = null;
  const click = (id) => document.getElementById(id)?.click();
  const fetchFromServer = window.fetch;

  /* ---- Runs: looked for by one small request; the open screen is refreshed only when something has changed ---- */
  let revision = null, states = new Map(), refreshed = 0, looked = 0, timer = null, isFollowed = false;

  /* The address at which the page was opened may name no screen: it shows the first one. */
  const openScreen = () => new URLSearchParams(location.search).get("tab") ?? "photos";
  const refresh = (screen = openScreen()) => click(`refresh-${screen}`);

  async function look() {
    clearTimeout(timer);
    looked = performance.now();
    if (!document.getElementById("activity")) return (timer = setTimeout(look, ACTIVE_MS));
    let active = false;
    try {
      const response = await fetchFromServer("activity", { cache: "no-store" });
      // The session has ended: the page of the server asks for the password.
      if (response.status === 401) return location.reload();
      if (response.ok) active = show(await response.json());
    } catch {
      // The server cannot be reached; Gradio tells the user.
    }
    timer = setTimeout(look, active && !document.hidden ? ACTIVE_MS : IDLE_MS);
  }

  function show(activity) {
    const before = states;
    states = new Map(activity.runs.map((run) => [run.id, run]));
    const active = activity.runs.filter((run) => run.active);
    showLine(active);
    for (const run of activity.runs) if (!run.active && before.get(run.id)?.active) notify(run);
    refreshIfChanged(activity.revision, [...states].some(([id, run]) => before.get(id)?.state !== run.state));
    return active.length > 0;
  }

  function refreshIfChanged(now, isNewState) {
    if (now === revision || document.hidden) return;
    // Before, the server has not been asked yet for what the page shows.
    if (isFollowed) {
      const wait = FOLLOWING.includes(openScreen()) ? REFRESH_MS : Infinity;
      if (!isNewState && performance.now() - refreshed < wait) return;
      if (isNewState) click("relist");
      refresh();
    }
    revision = now;
    refreshed = performance.now();
  }

  function showLine(active) {
    const line = document.getElementById("activity"), [link, others, button] = line.querySelectorAll("a, span, button");
    const run = active.find((each) => each.state === "running") ?? active[0];
    const percent = run?.percent == null ? "" : `${run.percent}% `;
    pageTitle ??= document.title;
    const title = run ? `${percent}${run.name} · ${pageTitle}` : pageTitle;
    set(document, "title", title);
    set(line, "hidden", !run);
    if (!run) return;
    set(link, "textContent", run.sentence);
    set(link, "href", addressOf({ tab: "train", run: run.id }));
    set(others, "textContent", active.length > 1 ? `and ${active.length - 1} more in the queue` : "");
    set(button, "hidden", !window.Notification || Notification.permission !== "default");
    line.style.setProperty("--share", (run.percent ?? 0) / 100);
  }

  /* Unchanged values are not set, since each change costs a layout and is read out. */
  function set(element, name, value) {
    if (element[name] !== value) element[name] = value;
  }

  function notify(run) {
    if (!window.Notification || Notification.permission !== "granted") return;
    const note = new Notification(`${run.name}: ${run.state}`, { body: run.sentence, icon: "favicon.ico", tag: run.id });
    note.onclick = () => {
      window.focus();
      open(addressOf({ tab: "train", run: run.id }));
    };
  }

  document.addEventListener("visibilitychange", () => document.hidden || look());
  document.addEventListener("click", (event) => {
    const link = event.target.closest("#activity a");
    if (link) {
      event.preventDefault();
      open(link.href);
    } else if (event.target.closest("#activity button")) {
      Notification.requestPermission().then(look);
    }
  });

  /* ---- The address names the open screen and the selected run ---- */
  function addressOf(changes) {
    const address = new URL(location.href);
    for (const [name, value] of Object.entries(changes)) value ? address.searchParams.set(name, value) : address.searchParams.delete(name);
    return address.href;
  }

  function open(address) {
    if (address !== location.href) history.pushState(null, "", address);
    follow();
  }

  /* What the page selects by itself when it opens is no step back: its first screen, which comes before that of the address, and
  the run if the address names none. */
  let isUsed = false;
  for (const type of ["click", "keydown"]) addEventListener(type, (event) => (isUsed ||= event.isTrusted), { capture: true });
  function shows(name, value, isStep = true) {
    const query = new URLSearchParams(location.search);
    if (!value || query.get(name) === value || (name === "tab" && !isUsed)) return;
    const isFirst = name === "run" && !query.has("run");
    history[isStep && !isFirst ? "pushState" : "replaceState"](null, "", addressOf({ [name]: value }));
    if (name === "tab") showsRun(false);
  }

  window.addEventListener("popstate", follow);
  /* The server selects the run. The tab is opened here, since its response may come after the user has opened another one. */
  function showsTab() {
    const tabs = [...document.querySelectorAll("#screens > .tab-wrapper [data-tab-id]")].filter((tab) => tab.checkVisibility());
    tabs.find((tab) => tab.dataset.tabId === openScreen() && tab.ariaSelected !== "true")?.click();
  }

  function follow() {
    showsTab();
    click("open-address");
  }

  /* The run that the open screen shows: Train has a list of its own. */
  function showsRun(isStep = true) {
    const menu = openScreen() === "train" ? ".on-train" : ".on-subject";
    setTimeout(() => shows("run", document.querySelector(`#run ${menu} summary`)?.dataset.run, isStep));
  }

  function selected(screen) {
    refresh(screen);
    shows("tab", screen);
  }

  /* The revision is read before anything that the page shows, so that no change between them is missed. */
  async function opening() {
    showsTab();
    await look();
    isFollowed = true;
  }

  /* The page shows what its address names: until it is laid out, its tabs cannot be opened, or are replaced. A user who was quicker
  has opened another screen meanwhile. */
  function opened() {
    refresh();
    setTimeout(settle, ANSWER_MS, 0);
  }

  function settle(tries) {
    const tab = document.querySelector("#screens > .tab-wrapper [aria-selected=true]")?.dataset.tabId;
    if (tab === openScreen()) return;
    isUsed ||= tries === MAX_TRIES;
    if (isUsed) return shows("tab", tab);
    showsTab();
    setTimeout(settle, ANSWER_MS, tries + 1);
  }

  window.noraVision = { showsTab, showsRun, refresh, selected, opening, opened };

  /* ---- Plots ----
  Gradio draws a plot again whenever its size changes by much, and leaves the observers of its earlier drawings. So it would draw
  the plots of a screen that is closed, at a width of 0, and again when it is opened; and of a plot that is removed, the second
  observer looks for an element that is gone. An element without a size is not shown, so no observer needs to hear of it. */
  window.ResizeObserver = class extends window.ResizeObserver {
    constructor(callback) {
      super((entries, observer) => {
        const shown = entries.filter(({ contentRect }) => contentRect.width || contentRect.height);
        if (shown.length) callback(shown, observer);
      });
    }
  };

  /* ---- Ctrl+Enter presses the main button of the screen ---- */
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    const button = [...document.querySelectorAll(".ctrl-enter")].find((each) => each.checkVisibility() && !each.disabled);
    if (!button) return;
    event.preventDefault();
    button.click();
  });

  /* ---- Event streams ----
  Gradio's server closes a page's event stream when no event is pending. A page that sends another event before it has read this
  believes that the stream is open, and waits for the response until a later event opens a new stream. */
  const CLOSED = 'data: {"msg":"close_stream"', COMPLETED = /^data: \{"msg":"process_completed","event_id":"([^"]+)"/;
  // The time at which each pending event was sent, and how often a stream was opened for it.
  const pending = new Map(), completed = new Set();
  let openStreams = 0;

  async function addEvent(response) {
    const { event_id } = await response.json();
    if (!event_id || completed.delete(event_id)) return;
    pending.set(event_id, { since: performance.now(), reopened: 0 });
    setTimeout(showBusy, BUSY_MS);
    // The page may have believed that the stream was still open.
    setTimeout(reopen, CLOSE_MS);
  }

  async function readStream(response, stream) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        stream.isClosed ||= line.startsWith(CLOSED);
        complete(line.match(COMPLETED)?.[1]);
      }
    }
  }

  function complete(event) {
    if (!event) return;
    if (!pending.delete(event)) completed.add(event);
    showBusy();
    // What the user did may have started or changed a run.
    if (performance.now() - looked > ANSWER_MS) look();
  }

  /* A line at the top of the page while an answer takes longer. */
  function showBusy() {
    const isBusy = [...pending.values()].some(({ since }) => performance.now() - since >= BUSY_MS - 1);
    if (document.body.hasAttribute("data-busy") !== isBusy) document.body.toggleAttribute("data-busy", isBusy);
  }

  function reopen() {
    if (openStreams > 0) return;
    // A cancelled event has no response.
    for (const [event, { reopened }] of pending) if (reopened === MAX_TRIES) pending.delete(event);
    showBusy();
    if (pending.size === 0) return;
    for (const event of pending.values()) event.reopened += 1;
    click("reopen-event-stream");
  }

  /* The page aborts a stream when it has read that the server closes it. If Gradio's server receives this before it has ended the
  stream, it drops the events that were sent in the meantime, so it is left to the server to end the stream. */
  function abortedUnlessClosed(signal, stream) {
    const aborter = new AbortController();
    signal?.addEventListener("abort", () => setTimeout(() => stream.isClosed || aborter.abort(), CLOSE_MS));
    return aborter.signal;
  }

  window.fetch = async (resource, options) => {
    const url = resource instanceof Request ? resource.url : String(resource);
    if (url.includes("/gradio_api/queue/join")) {
      const response = await fetchFromServer(resource, options);
      if (response.ok) await addEvent(response.clone());
      return response;
    }
    if (!url.includes("/gradio_api/queue/data")) return fetchFromServer(resource, options);
    openStreams += 1;
    const stream = { isClosed: false };
    const ended = () => {
      openStreams -= 1;
      setTimeout(reopen, REOPEN_MS);
    };
    try {
      const signal = abortedUnlessClosed(resource.signal ?? options?.signal, stream);
      const response = await fetchFromServer(resource, { signal });
      // Aborted, the stream ends with an error.
      readStream(response.clone(), stream).catch(() => {}).finally(ended);
      return response;
    } catch (error) {
      ended();
      throw error;
    }
  };

  look();
})();
