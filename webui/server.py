"""The server: its options, their checks, and Gradio with all unneeded features disabled."""

from __future__ import annotations

import argparse
import ctypes
import gc
import getpass
import hashlib
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Route

from pipelines.errors import InputError
from webui.accounts import Accounts, LoginGate, Sessions, add_account
from webui.inference_worker import WORKER
from webui.page import CARD, FAVICON, HEAD, STYLE, build_page, theme
from webui.runs import RunView, views
from webui.security import middlewares
from webui.workspace import Settings, app_command, is_loopback

logger = logging.getLogger("webui")

FIRST_PORT = 7860
# Large enough for zips and adapters. Images have a lower limit, checked in `pipelines.untrusted_images`.
MAX_UPLOAD_BYTES = 512 * 2**20
# Mentions the wait, because Gradio's form shows no message while sign-in is throttled.
SIGN_IN = "Sign in with your name and password. After five wrong passwords, wait for a minute."
# Hidden, so that it cannot be the name of an account or a dataset.
CACHE = ".cache"
CACHE_SECONDS = 86400
# Programs that call the API never close their sessions. The least recently used are forgotten, at about a megabyte each.
MAX_SESSIONS = 300
# Of glibc's malloc, with the numbers of malloc.h: blocks from this size on are returned to the system when they are freed, and
# the threads share so many arenas. With one for each of 40 threads, memory that one has freed is not used by the others.
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 2**20
M_ARENA_MAX, NUM_ARENAS = -8, 2
# The ended runs of which the page hears, so that it can tell that one has ended.
RECENT_RUNS = 20
# Gradio's environment variables that are not overwritten: harmless, and without an option here.
KEPT_VARIABLES = frozenset({"GRADIO_ROOT_PATH"})


def parser() -> argparse.ArgumentParser:
    """The options of `python app.py` and `nora-vision app`."""
    options = argparse.ArgumentParser(description="Open the web app.", allow_abbrev=False)
    add = options.add_argument
    add("--host", default=Settings.host, help="address to listen on; any but a loopback address needs --accounts")
    add("--port", type=int, help=f"port to listen on; by default the first free one from {FIRST_PORT} on")
    add("--runs_dir", type=Path, default=Settings.runs_dir, help="folder of the runs")
    add("--uploads_dir", type=Path, default=Settings.sets_dir, help="folder of the uploaded images and adapters")
    add("--accounts", type=Path, metavar="FILE", help="file of names and hashed passwords; every user must sign in")
    add("--add_account", metavar="NAME", help="ask for a password, add the account to --accounts, and exit")
    models = "base models that guests may use besides the built-in ones"
    add("--base_model", nargs="+", default=[], metavar="NAME", help=models)
    add("--share", action="store_true", help="also open a public link through Gradio's servers")
    add("--inbrowser", action="store_true", help="open the page in a browser")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the app until it is interrupted; returns the exit code: 2 for invalid options."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        if options.add_account is not None:
            return _add_account(options.accounts or Path("accounts.txt"), options.add_account)
        return serve(checked_settings(options), share=options.share, in_browser=options.inbrowser)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def checked_settings(options: argparse.Namespace) -> Settings:
    """Validate the options and convert them to settings.

    Raises: InputError if others could use the app without a password, or a folder or the port cannot be used.
    """
    if options.port is not None and not 1 <= options.port <= 65535:
        raise InputError(f"--port must be in [1, 65535], got {options.port}. Leave it out to use the first free port.")
    if options.accounts is None and (options.share or not is_loopback(options.host)):
        opened = "--share" if options.share else f"--host {options.host}"
        raise InputError(
            f"{opened} opens the app to others without a password. Create an account with "
            f"'{app_command()} --accounts accounts.txt --add_account NAME', and add '--accounts accounts.txt'."
        )
    if options.accounts is not None:
        Accounts(options.accounts).check()
    for name, folder in (("runs_dir", options.runs_dir), ("uploads_dir", options.uploads_dir)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--{name} {str(folder)!r} cannot be created ({error}). Choose another folder.") from error
    runs, uploads = options.runs_dir.absolute(), options.uploads_dir.absolute()
    return Settings(runs, uploads, options.host, options.port, options.accounts, tuple(options.base_model))


def serve(settings: Settings, share: bool = False, in_browser: bool = False) -> int:
    """Serve the page until an interrupt. Runs are separate processes and continue."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    limit_free_memory()
    page = launched(settings, share, in_browser)
    # Python looks for unreachable objects when a quarter more are kept than last time. Without those of libraries, which stay, it
    # soon finds those of closed pages.
    gc.collect()
    gc.freeze()
    logger.info("NoRA Vision is at %s (Ctrl-C stops it; training runs continue)", page.local_url)
    if page.share_url:
        logger.info("Public link for everyone with an account: %s", page.share_url)
    stop.wait()
    page.close(verbose=False)
    return 0


def limit_free_memory() -> None:
    """Let glibc return the memory of decoded images to the system, of which it would keep about 60 MB in each thread."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        library.mallopt(M_ARENA_MAX, NUM_ARENAS)


# Gradio's own texts lack the label of a button of gr.File, and what a screen reader says at the end of an event: instead of them,
# it would be their keys.
TEXTS = gr.I18n(en={"common.upload": "Upload", "common.complete": "Complete"})
LAUNCH_OPTIONS = {
    "i18n": TEXTS,
    "max_file_size": MAX_UPLOAD_BYTES,
    "prevent_thread_lock": True,
    "strict_cors": True,
    "run_history": False,
    "enable_monitoring": False,
    "ssr_mode": False,
    "pwa": False,
    "mcp_server": False,
    "num_workers": 0,
    "state_session_capacity": MAX_SESSIONS,
    "footer_links": [],
    "quiet": True,
}


def launched(settings: Settings, share: bool = False, in_browser: bool = False) -> gr.Blocks:
    """Start the server; returns the page.

    Raises: InputError if the port is taken.
    """
    cache = settings.sets_dir / CACHE
    _prepare_environment(cache)
    page, accounts = build_page(settings), None if settings.accounts is None else Accounts(settings.accounts)
    sign_in = {} if accounts is None else {"auth": LoginGate(accounts).admits, "auth_message": SIGN_IN}
    routes = [Route("/card.png", lambda request: FileResponse(CARD)), activity_route(settings)]
    outside = {"middleware": middlewares(settings, cache, HEAD), "routes": routes}
    look = {"favicon_path": FAVICON, "theme": theme(), "css_paths": [STYLE]}
    address = {"server_name": settings.host, "server_port": settings.port, "share": share, "inbrowser": in_browser}
    try:
        app, _, _ = page.launch(**address, **sign_in, **look, **LAUNCH_OPTIONS, app_kwargs=outside)
    except OSError as error:
        taken = "No port is free" if settings.port is None else f"Port {settings.port} is taken, or not allowed"
        raise InputError(f"{taken} at {settings.host}. Choose another one with --port.") from error
    if accounts is not None:
        app.tokens = Sessions(accounts)
    WORKER.start()
    return page


def activity_route(settings: Settings) -> Route:
    """The address that page.js asks for changes: what runs, and a text that differs after every change of a run."""

    def activity(request: Request) -> JSONResponse:
        runs = views(settings.workspace_of(request.scope.get("user")))
        revision = hashlib.sha256(repr([view.version for view in runs]).encode()).hexdigest()
        active, ended = [view for view in runs if view.is_active], [view for view in runs if not view.is_active]
        return JSONResponse({"revision": revision, "runs": [_described(view) for view in active + ended[:RECENT_RUNS]]})

    return Route("/activity", activity)


def _described(view: RunView) -> dict[str, object]:
    percent = None if view.share is None else round(100 * view.share)
    state = {"state": view.state, "active": view.is_active, "percent": percent, "sentence": view.sentence}
    return {"id": view.id, "name": view.title, **state}


def _prepare_environment(cache: Path) -> None:
    """Remove Gradio's environment variables, which could override the settings, and create a cache folder of mode 0700."""
    for name in [name for name in os.environ if name.startswith("GRADIO_") and name not in KEPT_VARIABLES]:
        del os.environ[name]
    os.environ |= {"GRADIO_TEMP_DIR": str(cache), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # Of the statistics that Gradio keeps of events, which nobody sees.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1000"
    cache.mkdir(parents=True, exist_ok=True)
    cache.chmod(0o700)
    oldest = time.time() - CACHE_SECONDS
    for path in cache.rglob("*"):
        if path.is_file() and path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)


def _add_account(path: Path, name: str) -> int:
    password = getpass.getpass(f"Password for {name}: ")
    if password != getpass.getpass("Repeat the password: "):
        raise InputError("The two passwords differ. Try again.")
    add_account(path, name, password)
    logger.info("Added the account %s to %s", name, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
