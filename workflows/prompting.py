"""A prompt bank written by a language model behind an OpenAI-compatible chat endpoint, and checked.

Only here does anything talk to a language model: the bank is a file, a run copies what it uses of it into its
workspace, so neither a run nor a replay needs the endpoint.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from generation.cut.prompts import HEAD, LONGEST, VERSION, Bank, load_bank, parse_bank, too_long
from manifests.errors import FlawsmithError, UsageError
from manifests.wording import SEVERITIES, SIZES, noun_of
from workflows.console import say

MOST_BYTES = 2**20  # of an answer
ATTEMPTS = 3  # answers asked for a category; each but the first is told what was wrong with the one before
CHUNK = 2**14
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


class EndpointError(FlawsmithError):
    """The endpoint cannot be reached, or does not answer as a chat endpoint does."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def write_bank(
    categories: Sequence[str],
    endpoint: str,
    model: str,
    out: Path,
    *,
    key_variable: str | None = None,
    timeout: float = 120.0,
) -> Bank:
    """Asks for the entries of every category and writes them as one bank, once all are there.

    Args:
        categories: as the pictures' source names them; an entry is for its category only.
        endpoint: base address (``http://host:8000/v1``), or the full one that ends in ``/chat/completions``.
        model: as the endpoint calls it.
        out: a new file that ends in .json.
        key_variable: environment variable that holds the key; None: no key is sent.
        timeout: seconds for one whole answer.

    Raises:
        UsageError: an argument is wrong; nothing was asked.
        EndpointError: no answer, an error, or ``ATTEMPTS`` answers that are no entries.
    """
    url, key = _address(endpoint), _key(key_variable)
    if out.suffix != ".json":
        raise UsageError(f"--out {out}: a prompt bank that is written ends in .json")
    if out.exists():
        raise UsageError(f"--out {out} is there already: remove it or name another file")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.absolute().parent}; make it first")
    for category in categories:
        if not 0 < len(category.strip()) <= 60 or not category.isprintable() or set(category) & set("{}"):
            raise UsageError(
                f"category {category!r}: 1 to 60 printable characters without braces are allowed"
            )
    entries: list[dict[str, Any]] = []
    for category in dict.fromkeys(categories):
        found = _ask_category(category, url, model, key, timeout)
        say(f"{category}: {', '.join(entry['defect'] for entry in found)}")
        entries += found
    raw = {"version": VERSION, "origin": f"{model} at {urlsplit(url).hostname}"[:400], "entries": entries}
    bank = parse_bank(raw, str(out))
    aside = out.with_name(f"{out.name}.{uuid.uuid4().hex}.part")
    try:
        aside.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return bank


def _address(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        named = False
    if not named:
        raise UsageError(
            f"--endpoint {endpoint!r} is no http or https address, e.g. http://localhost:8000/v1"
        )
    if parts.username or parts.password:
        raise UsageError("--endpoint holds a name or password: give the key with --api-key-env VARIABLE")
    path = parts.path.rstrip("/")
    return parts._replace(
        path=path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    ).geturl()


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UsageError(f"--api-key-env {variable}: the environment has no such variable, or it is empty")
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"--api-key-env {variable}: its value has characters that no key has")
    return key


def instruction(category: str) -> str:
    """What the model is asked: the form of the entries, with one of the shipped bank as the example."""
    example = load_bank().entries[0].model_dump(mode="json", exclude={"kinds", "categories"})
    sizes, severities = (", ".join(word for step in steps for word in step) for steps in (SIZES, SEVERITIES))
    return (
        f"A camera inspects parts of the category {category!r} ({noun_of(category)}). Name 5 to 8 defects "
        "that such a part may plausibly have and that a single photo shows. Answer with JSON only: an object "
        '{"entries": [...]}, one entry a defect, each of exactly this form:\n'
        f"{json.dumps(example, ensure_ascii=False)}\n"
        "Rules: `word` is one visual noun or adjective (at most three words), as a rule equal to `defect`, "
        "and stands literally in every one of `prompts`. `synonyms` are other forms of it. Every prompt "
        f"holds {{object}}; every one of `details` is one sentence of at most {LONGEST} words that begins "
        f"with {HEAD!r} and states shape, change of colour or texture, and extent. The only slots are "
        f"{{object}}, {{size}}, {{shape}} and {{severity}}. `size` takes words of: {sizes}; `severity` of: "
        f"{severities}; `shape` takes plain adjectives; leave a list empty and its slot out where it does "
        "not fit. Plain English words, only what can be seen, no people, no brands."
    )


def _ask_category(
    category: str, url: str, model: str, key: str | None, timeout: float
) -> list[dict[str, Any]]:
    """Checked entries of one category, as plain values."""
    messages = [{"role": "user", "content": instruction(category)}]
    problem = ""
    for _ in range(ATTEMPTS):
        answer = ask(url, model, messages, key, timeout)
        try:
            return entries_from(answer, category)
        except UsageError as error:
            problem = str(error)
        messages += [
            {"role": "assistant", "content": answer},
            {
                "role": "user",
                "content": f"That cannot be used:\n{problem}\nAnswer again, with JSON only.",
            },
        ]
    raise EndpointError(
        f"category {category!r}: {ATTEMPTS} answers of {model} were no usable entries; nothing was written. "
        f"The last one:\n{problem}\nTry another model, or write the bank by hand "
        "(generation/cut/prompts.json shows the form)"
    )


def entries_from(answer: str, category: str) -> list[dict[str, Any]]:
    """The entries of a model's answer, for one category, as plain values.

    Args:
        answer: JSON, an object with ``entries`` or their list, perhaps within a fenced block.

    Raises:
        UsageError: it is not that, or an entry does not fit the bank; every problem at once.
    """
    fenced = _FENCE.search(answer)
    try:
        raw = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the answer for {category!r} is no JSON: {error}") from None
    entries = raw.get("entries") if isinstance(raw, dict) else raw
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f'the answer for {category!r} is no list of entries: {{"entries": [{{...}}, ...]}}')
    mine = [{**entry, "kinds": ["texture", "object"], "categories": [category]} for entry in entries]
    name = f"the answer for {category!r}"
    bank = parse_bank({"version": VERSION, "entries": mine}, name)
    problems = too_long(bank, [noun_of(category)])
    if problems:
        raise UsageError("\n".join(f"{name}: {problem}" for problem in problems))
    return [entry.model_dump(mode="json") for entry in bank.entries]


def ask(url: str, model: str, messages: Sequence[dict[str, str]], key: str | None, timeout: float) -> str:
    """One answer of a chat endpoint.

    Raises:
        EndpointError: it cannot be reached, is too slow, answers with an error, with more than
            ``MOST_BYTES``, or not in the form of a chat completion. The message never holds the key.
    """
    body = json.dumps({"model": model, "messages": list(messages), "temperature": 0.7}).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, body, headers)
    late = f"{url}: no whole answer within {timeout:g} s: try again, or allow more with --timeout"
    deadline = time.monotonic() + timeout
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as response:
            data = _read(response, deadline)
    except urllib.error.HTTPError as error:
        with error:
            said = _hidden(f"{error.code} {error.reason}{_excerpt(error)}", key)
        raise EndpointError(f"{url} answered {said[:400]}; {_remedy(error.code)}") from None
    except TimeoutError:
        raise EndpointError(late) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise EndpointError(late) from None
        raise EndpointError(f"{url} cannot be reached: {error.reason}; is the server running?") from None
    except (OSError, HTTPException) as error:
        what = str(error) or type(error).__name__
        raise EndpointError(f"{url}: the connection broke ({what}); try again") from None
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, RecursionError):
        raise EndpointError(
            f"{url} did not answer with a chat completion (choices[0].message.content): is it an "
            "OpenAI-compatible chat endpoint?"
        ) from None
    return content


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """The body. A timeout of the socket alone would let a trickle of bytes go on for ever."""
    data = b""
    while chunk := response.read1(CHUNK):
        data += chunk
        if len(data) > MOST_BYTES:
            raise EndpointError(f"the endpoint answered with more than {MOST_BYTES} bytes; nothing was used")
        if time.monotonic() > deadline:
            raise TimeoutError
    return data


def _hidden(text: str, key: str | None) -> str:
    """The text without the key, which some servers repeat."""
    return text.replace(key, "[key]") if key else text


def _excerpt(error: urllib.error.HTTPError) -> str:
    """An error's text, on one line; empty if there is none."""
    try:
        text = " ".join(error.read(CHUNK).decode("utf-8", "replace").split())
    except (OSError, HTTPException):
        return ""
    return f": {text}" if text else ""


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "name the variable that holds a valid key with --api-key-env"
    if status == 404:
        return "check --endpoint (it usually ends in /v1) and --model"
    if 300 <= status < 400:
        return "give the address that it points to; redirects are not followed, they would carry the key away"
    if status == 429:
        return "too many requests: wait and try again"
    return "try again later, or look at the server's log" if status >= 500 else "check --endpoint and --model"
