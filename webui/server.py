"""The server: its options, their checks, and Gradio with all unneeded features disabled.

Gradio is imported after the options are checked, so that errors are reported at once.
"""

from __future__ import annotations

import argparse
import getpass
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import InputError
from webui.accounts import Accounts, LoginGate, Sessions, add_account
from webui.settings import Settings, app_command, is_loopback

if TYPE_CHECKING:
    import gradio as gr

    from webui.guard import Visits

logger = logging.getLogger("webui")

FIRST_PORT = 7860
# Zips and adapters come over the same road as images, whose own limit is checked as they are taken in.
MAX_UPLOAD_BYTES = 512 * 2**20
# Gradio's form shows no message while sign-in is throttled.
SIGN_IN = "Sign in with the name and the password that you were given. After five wrong passwords, wait for a minute."
# Hidden, so that no account and no image set is called so.
CACHE = ".cache"
CACHE_SECONDS = 86400
# The page asks for its first figures as soon as it is drawn; nobody may have opened it by then.
WARM_UP_AT_LATEST = 20.0
# What of gradio's environment has no option here and does no harm.
KEPT_VARIABLES = frozenset({"GRADIO_ROOT_PATH"})


def parser() -> argparse.ArgumentParser:
    """The options of `python app.py` and `nora-vision app`."""
    options = argparse.ArgumentParser(description="Open the web app.", allow_abbrev=False)
    options.add_argument("--host", default="127.0.0.1", help="address to listen on; another than this machine needs --accounts")
    options.add_argument("--port", type=int, help=f"port; the first free one from {FIRST_PORT} on by default")
    options.add_argument("--runs_dir", type=Path, default=Path("runs"), help="folder of the runs")
    options.add_argument("--uploads_dir", type=Path, default=Path("uploads"), help="folder of uploaded images and adapters")
    options.add_argument("--accounts", type=Path, metavar="FILE", help="file of names and hashed passwords; all must sign in")
    options.add_argument("--add_account", metavar="NAME", help="ask for a password, write it hashed to --accounts, and end")
    options.add_argument("--base_model", nargs="+", default=[], metavar="NAME", help="further models that guests may start from")
    options.add_argument("--share", action="store_true", help="also open a public link through gradio's servers")
    options.add_argument("--inbrowser", action="store_true", help="open the page in the browser")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the app until it is interrupted; returns the exit code, 2 for invalid options."""
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

    Raises: InputError if strangers could come in without a password, or a folder or port cannot be used.
    """
    if options.port is not None and not 1 <= options.port <= 65535:
        raise InputError(f"--port must be in [1, 65535], got {options.port}. Leave it out for the first free one.")
    if options.accounts is None and (options.share or not is_loopback(options.host)):
        opened = "--share" if options.share else f"--host {options.host}"
        raise InputError(
            f"{opened} lets others in, and nobody must sign in. Make an account with "
            f"'{app_command()} --accounts accounts.txt --add_account NAME', and add '--accounts accounts.txt'."
        )
    if options.accounts is not None:
        Accounts(options.accounts).check()
    for name, folder in (("runs_dir", options.runs_dir), ("uploads_dir", options.uploads_dir)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--{name} {str(folder)!r} cannot be made ({error}). Name another folder.") from error
    return Settings(
        runs_dir=options.runs_dir.absolute(),
        sets_dir=options.uploads_dir.absolute(),
        host=options.host,
        port=options.port,
        accounts=options.accounts,
        base_models=tuple(options.base_model),
    )


def serve(settings: Settings, share: bool = False, in_browser: bool = False) -> int:
    """Open the page and wait for an interrupt; runs are processes of their own and go on."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    page = launched(settings, share, in_browser)
    logger.info("NoRA Vision is at %s (Ctrl-C ends it; runs go on)", page.local_url)
    if page.share_url:
        logger.info("and at %s for everyone with an account", page.share_url)
    stop.wait()
    page.close(verbose=False)
    return 0


LAUNCH_OPTIONS = {
    "max_file_size": MAX_UPLOAD_BYTES,
    "prevent_thread_lock": True,
    "strict_cors": True,
    "run_history": False,
    "enable_monitoring": False,
    "ssr_mode": False,
    "pwa": False,
    "mcp_server": False,
    "num_workers": 0,
    "footer_links": [],
    "quiet": True,
}


def launched(settings: Settings, share: bool = False, in_browser: bool = False) -> gr.Blocks:
    """The page, served.

    Raises: InputError if the port is taken.
    """
    _prepare_environment(settings.sets_dir / CACHE)
    from starlette.middleware import Middleware

    from webui.guard import Guard, Visits
    from webui.page import build_page
    from webui.theme import STYLE, theme

    page, accounts = build_page(settings), None
    if settings.accounts is not None:
        accounts = Accounts(settings.accounts)
    visits = Visits()
    guard = Middleware(Guard, settings=settings, cache=settings.sets_dir / CACHE, visits=visits)
    try:
        app, _, _ = page.launch(
            server_name=settings.host,
            server_port=settings.port,
            share=share,
            inbrowser=in_browser,
            auth=None if accounts is None else LoginGate(accounts).admits,
            auth_message=None if accounts is None else SIGN_IN,
            app_kwargs={"middleware": [guard]},
            theme=theme(),
            css_paths=[STYLE],
            **LAUNCH_OPTIONS,
        )
    except OSError as error:
        taken = "No port is free" if settings.port is None else f"Port {settings.port} is taken, or not allowed"
        raise InputError(f"{taken} at {settings.host}. Give another one with --port.") from error
    if accounts is not None:
        app.tokens = Sessions(accounts)
    threading.Thread(target=_warm_up, args=(visits,), daemon=True, name="warm-up").start()
    return page


def _prepare_environment(cache: Path) -> None:
    """Leave to gradio nothing that was not decided here, and give it a folder that no other user of the machine can look into."""
    for name in [name for name in os.environ if name.startswith("GRADIO_") and name not in KEPT_VARIABLES]:
        del os.environ[name]
    os.environ |= {"GRADIO_TEMP_DIR": str(cache), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    cache.mkdir(parents=True, exist_ok=True)
    cache.chmod(0o700)
    oldest = time.time() - CACHE_SECONDS
    for path in cache.rglob("*"):
        if path.is_file() and path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)


def _warm_up(visits: Visits) -> None:
    """Import what the screens need once they are used: after the first page is up, which it would otherwise delay."""
    visits.first.wait(WARM_UP_AT_LATEST)
    from webui import work

    for name in sorted(work.MODULES):
        getattr(work, name)


def _add_account(path: Path, name: str) -> int:
    password = getpass.getpass(f"Password for {name}: ")
    if password != getpass.getpass("The same again: "):
        raise InputError("The two passwords differ. Try again.")
    add_account(path, name, password)
    logger.info("%s can sign in with --accounts %s", name, path)
    return 0
