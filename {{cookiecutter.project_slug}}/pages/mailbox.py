"""/mailbox: the messages to users that were not sent, in development without MAIL_URL.

A link in a message leads to the front end, which a new project does not have yet. So the mailbox
offers the same token on the page at /.
"""

import re
from email.message import EmailMessage
from email.utils import parsedate_to_datetime
from html import escape

from fastapi import APIRouter, Depends, HTTPException, Request, status
from fastapi.responses import HTMLResponse

from auth.links import link
from config import Settings
from pages.home import PAGE, refuse_foreign_names
from pages.policy import secure_page
from resources import resources

STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)
# There are no scripts, and the frames of HTML messages have this page's policy. Messages have
# styles of their own; a picture of another server is not loaded.
SOURCES = {"style-src": "'unsafe-inline'", "img-src": "data:", "connect-src": "'none'"}
DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Mailbox - {app}</title>
<link rel="icon" href="data:,">
{style}
</head>
<body>
<header>
  <div>
    <h1>Mailbox</h1>
    <p class="quiet small">Without <code>MAIL_URL</code>, messages are not sent. The last {kept} are
      kept in memory, until the app restarts. Production does not have this page.</p>
  </div>
  <nav aria-label="Pages">
    <ul>
      <li><a href="mailbox">Refresh</a></li>
      <li><a href="./">Back to {app}</a></li>
    </ul>
  </nav>
</header>
<main class="messages">
{messages}
</main>
</body>
</html>
"""
EMPTY = """<p class="card">There are no messages. Register, or ask for a new password, on
  <a href="./">the page at /</a>.</p>"""
MESSAGE = """<article class="card">
  <h2>{subject}</h2>
  <p class="quiet small">To {to}, <time>{date}</time></p>
  {here}
  <pre tabindex="0" role="group" aria-label="Text">{text}</pre>
  <details>
    <summary>As HTML</summary>
    <iframe title="{subject}" sandbox="allow-popups allow-popups-to-escape-sandbox" loading="lazy"
      srcdoc="{html}"></iframe>
  </details>
</article>"""
HERE = """<p><a class="main" href="./#{purpose}={token}">{words}</a></p>
  <p class="quiet small">The link in the message opens your front end. This one does the same on
    the page at /.</p>"""

router = APIRouter(include_in_schema=False, dependencies=[Depends(refuse_foreign_names)])


@router.get("/mailbox")
def get_mailbox(request: Request) -> HTMLResponse:
    """Show the messages, the newest first."""
    settings, mailbox = resources(request).settings, resources(request).mailer.mailbox
    if mailbox is None:  # messages are sent, or there are none
        raise HTTPException(status.HTTP_404_NOT_FOUND)
    style = STYLE.search(PAGE.read_text("utf-8"))
    shown = [show(message, settings) for message in reversed([*mailbox])]
    page = DOCUMENT.format(
        app=escape(settings.app_name),
        style=style[0] if style else "",
        kept=mailbox.maxlen,
        messages="\n".join(shown) or EMPTY,
    )
    return secure_page(page, SOURCES)


def show(message: EmailMessage, settings: Settings) -> str:
    text, html = content(message, "plain"), content(message, "html")
    date = parsedate_to_datetime(message["Date"]).astimezone()  # of this machine, as the reader's
    return MESSAGE.format(
        subject=escape(message["Subject"]),
        to=escape(message["To"]),
        date=f"{date:%d %b %Y, %H:%M:%S}",
        here=offer(text, settings),
        text=escape(text),
        html=escape(f'<base target="_blank">{html}'),
    )


def content(message: EmailMessage, kind: str) -> str:
    part = message.get_body((kind,))
    text: str = part.get_content() if part else ""
    return text


def offer(text: str, settings: Settings) -> str:
    """Return a link to the page at / with the token of a message; empty if it has none."""
    for purpose, path, words in (
        ("reset", settings.frontend_reset_path, "Choose a new password here"),
        ("verify", settings.frontend_verify_path, "Verify the address here"),
    ):
        if found := re.search(re.escape(link(settings, path, "")) + r"([\w.~%-]+)", text):
            return HERE.format(purpose=purpose, token=found[1], words=words)
    return ""
