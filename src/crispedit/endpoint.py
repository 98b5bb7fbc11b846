"""Calls to an OpenAI-compatible server: its address, its key, retries, and why a call failed.

All that is needed is POST with JSON in and out, so the client is the standard library's: the one that huggingface_hub
brings has been another with each of its major versions (requests, httpx, httpx2), and transformers allows several.
"""

import email.utils
import http.client
import ipaddress
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from ._version import __version__
from .errors import ConfigError, EndpointError
from .progress import log

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable that holds the key, where no other is named."""
ROUTES = ("/chat/completions", "/completions")
_MOST_BYTES = 4 << 20
"""Of a reply: a server that sends more is not answering the question."""
_CHECK_SECONDS = 15.0
"""To find out whether a server is there."""
_TRANSIENT = {408, 425, 429}
"""Statuses below 500 after which the same request may succeed."""

T = TypeVar("T")


class CallFailed(EndpointError):
    """One call failed for good; others to the same server may not."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a call is tried for.

    Args:
        attempts: At most.
        wait: Seconds before the second attempt; doubled before each further one, and shortened by chance to between
            half and all of it, so that calls that failed together do not come back together.
        longest: Most seconds between two attempts; a server that asks for more has its call given up.
        timeout: Seconds without a byte from the server.
    """

    attempts: int = 6
    wait: float = 1.0
    longest: float = 120.0
    timeout: float = 60.0


class _NotFound(EndpointError):
    """There is no such address, or no such model."""


class _Transient(Exception):
    """An attempt failed, and the next may not; ``wait``: the seconds that the server asks for, if it does."""

    def __init__(self, said: str, wait: float | None = None) -> None:
        super().__init__(said)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST loses its body, and its key goes to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        """Never."""


class Endpoint:
    """An OpenAI-compatible server.

    Args:
        url: Its address, with or without ``/v1`` and the route.
        option: The option that gave it, for messages; ``OPTION-key-variable`` names the key's variable.
        key_variable: Environment variable with the key; ``OPENAI_API_KEY`` when omitted, and then the key does not go
            to another machine over plain http.
        patience: How long a call is tried for.

    Raises:
        ConfigError: The address cannot be one, or there is no key where one is needed.
    """

    def __init__(
        self, url: str, *, option: str = "--endpoint", key_variable: str | None = None, patience: Patience = Patience()
    ) -> None:
        self.url = base_address(url, option)
        self.patience = patience
        self.key_variable = key_variable or KEY_VARIABLE
        loopback = _is_loopback(self.url)
        self._key = self._find_key(f"{option}-key-variable", named=key_variable is not None, loopback=loopback)
        proxies = urllib.request.ProxyHandler({} if loopback else None)
        self._opener = urllib.request.build_opener(proxies, _NoRedirects())

    def _find_key(self, option: str, *, named: bool, loopback: bool) -> str | None:
        key = os.environ.get(self.key_variable, "").strip()
        secure = self.url.startswith("https:")
        if not key:
            if named or (secure and not loopback):
                raise ConfigError(
                    f"no key for {self.url}: set the environment variable {self.key_variable}, or name another with "
                    f"{option} (any value will do where the server wants none)"
                )
            return None
        if not re.fullmatch(r"[!-~]+", key):  # the header would be refused in an error that shows it
            raise ConfigError(f"the key in {self.key_variable} has blanks or characters beyond ASCII in it")
        if not (named or secure or loopback):
            log.info("no key is sent to %s over plain http; to send one, name its variable with %s", self.url, option)
            return None
        return key

    def check(self) -> None:
        """Finds out whether the server is there and takes the key, by asking for its list of models.

        Not every server has such a list, so that any other reply is good enough.

        Raises:
            EndpointError: It cannot be reached, refuses the key, or redirects.
        """
        try:
            self._send("/models", None, min(_CHECK_SECONDS, self.patience.timeout))
        except urllib.error.URLError as error:
            raise EndpointError(f"cannot reach {self.url}: {_reason(error)}") from None
        except (CallFailed, _NotFound, _Transient, OSError, http.client.HTTPException):
            return

    def post(
        self, route: str, body: dict[str, Any], read: Callable[[Any], T], *, sleep: Callable[[float], Any] = time.sleep
    ) -> T:
        """Sends one request, again where it fails in a way that may pass.

        Args:
            route: Such as ``/chat/completions``.
            body: Sent as JSON.
            read: Takes what is wanted from the reply's JSON; where it raises ``LookupError``, ``TypeError`` or
                ``ValueError``, fields are missing.
            sleep: Waits some seconds between attempts.

        Returns:
            What ``read`` returns.

        Raises:
            CallFailed: This call failed for good; an ``EndpointError`` that is none, every other would too.
        """
        data = json.dumps(body).encode()
        attempt = 1
        while True:
            try:
                return self._attempt(route, data, read)
            except _Transient as error:
                wait = error.wait
                if wait is None:
                    wait = min(self.patience.longest, self.patience.wait * 2 ** (attempt - 1))
                    wait *= random.uniform(0.5, 1)
                if wait > self.patience.longest:
                    raise CallFailed(f"{self.url}: {error}; it asks to be left alone for {wait:,.0f} s") from None
                if attempt == self.patience.attempts:
                    raise CallFailed(f"{self.url}: {error}, after {attempt} attempts") from None
            sleep(wait)
            attempt += 1

    def _attempt(self, route: str, data: bytes, read: Callable[[Any], T]) -> T:
        """One request; everything that may pass is ``_Transient``."""
        try:
            body = self._send(route, data, self.patience.timeout)
        except TimeoutError:
            raise _Transient(f"no reply within {self.patience.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Transient(f"the connection broke ({_reason(error)})") from None
        try:
            found = json.loads(body)
        except ValueError:
            raise _Transient("the reply is not JSON, or was cut off") from None
        try:
            return read(found)
        except (LookupError, TypeError, ValueError):
            raise _Transient(f"the reply is not what {route} replies: {self._excerpt(body)}") from None

    def _send(self, route: str, data: bytes | None, timeout: float) -> bytes:
        """The body of the reply to one request."""
        headers = {"Content-Type": "application/json", "User-Agent": f"crispedit/{__version__}"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url + route, data, headers)
        try:
            with self._opener.open(request, timeout=timeout) as response:
                body: bytes = response.read(_MOST_BYTES)
                return body
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error)

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        """Raises what a status other than 200 means."""
        status = error.code
        if status in (401, 403):  # the reply's own words may show a part of the key
            key = f"refuses the key in {self.key_variable}" if self._key else f"wants a key: set {self.key_variable}"
            raise EndpointError(f"{self.url} {key} ({status})")
        if 300 <= status < 400:
            where = self._line(error.headers.get("Location") or "another address")
            raise EndpointError(f"{self.url} redirects to {where}: give that address")
        try:
            body = error.read(_MOST_BYTES)
        except (OSError, http.client.HTTPException):
            body = b""
        said = self._line(f"{status} {error.reason}") + (f": {self._excerpt(body)}" if body.strip() else "")
        if status == 404:
            raise _NotFound(f"{self.url} has no such model, or is no such address ({said})")
        if status in _TRANSIENT or status >= 500:
            raise _Transient(said, _retry_after(error.headers.get("Retry-After")))
        raise CallFailed(f"{self.url}: {said}")

    def _excerpt(self, body: bytes) -> str:
        """What the server says went wrong, or what it says at all."""
        text = body.decode(errors="replace")
        try:
            said = json.loads(text)
            while isinstance(said, dict) and (inner := next(filter(None, map(said.get, _SAYING)), None)):
                said = inner
            text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
        except ValueError:
            pass
        text = self._line(text)
        return text if len(text) <= 200 else text[:200] + " …"

    def _line(self, text: str) -> str:
        """A server's words on one line, without the key and without what a terminal would act on."""
        text = text.replace(self._key, "…") if self._key else text
        return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


_SAYING = ("error", "message", "detail")
"""Where servers put what went wrong, from the outside in."""


def base_address(url: str, option: str) -> str:
    """The part of a server's address before the route.

    Args:
        url: With or without ``/v1`` and the route.
        option: The option that gave it, for messages.

    Returns:
        The address; where its path has no version and no route was given, ``/v1`` is added.

    Raises:
        ConfigError: It is no http address, or has a name, a password or a query in it.
    """
    try:
        parts = urlsplit(url.strip())
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        right = False
    if not right or not re.fullmatch(r"[!-~]+", url.strip()):
        raise ConfigError(f"{option} is no address of a server: it must look like http://localhost:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            f"{option} must have no name, password or query in its address; the key goes into an environment variable"
        )
    path = parts.path.rstrip("/")
    route = next((route for route in ROUTES if path.endswith(route)), "")
    path = path.removesuffix(route)
    if not route and not re.search(r"/v\d", path):
        path += "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _reason(error: Exception) -> str:
    """Why a connection could not be made or broke, in a few words."""
    inner = getattr(error, "reason", error)
    said = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return " ".join(str(said).split())


def _retry_after(value: str | None) -> float | None:
    """Seconds that a server asks to wait: a number, or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
