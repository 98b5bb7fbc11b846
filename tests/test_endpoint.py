"""One call to a server that misbehaves in every way: what is tried again, how long, and what is said in the end."""

import email.utils
import time

import pytest

from crispedit.endpoint import CallFailed, Endpoint, Patience, base_address
from crispedit.errors import ConfigError, EndpointError
from servers import KEY, Reply, closed_port, in_turn, serving

QUICK = Patience(attempts=4, wait=0.01, timeout=0.4)
GOOD = Reply({"answer": 7})
BAD = {
    "429": Reply({"error": {"message": "slow down"}}, 429),
    "500": Reply(b"<html>oh no</html>", 500),
    "503": Reply(b"", 503),
    "408": Reply({"detail": "too slow"}, 408),
    "cut off": Reply({"answer": 7, "more": "x" * 100}, cut=50),
    "wrong JSON": Reply(b"{'answer': 7}"),
    "another page": Reply(b"<html>log in first</html>"),
    "no field": Reply({"answers": 7}),
    "another type": Reply([1, 2]),
}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(url, *, slept=None, patience=QUICK, **options):
    waits = [] if slept is None else slept
    return Endpoint(url, patience=patience, **options).post(
        "/completions", {"prompt": "What?"}, lambda found: int(found["answer"]), sleep=waits.append
    )


@pytest.mark.parametrize("bad", BAD)
def test_what_may_pass_is_tried_again(bad):
    slept = []
    with serving(in_turn(BAD[bad], BAD[bad], GOOD)) as server:
        assert ask(server.url, slept=slept) == 7
    assert [request.path for request in server.requests] == ["/v1/completions"] * 3
    assert [request.body for request in server.requests] == [{"prompt": "What?"}] * 3
    assert 0.005 <= slept[0] <= 0.01 <= slept[1] <= 0.02


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("429", "429 Too Many Requests: slow down, after 4 attempts"),
        ("500", "500 Internal Server Error: <html>oh no</html>, after 4 attempts"),
        ("cut off", "the reply is not JSON, or was cut off, after 4 attempts"),
        ("no field", 'the reply is not what /completions replies: {"answers": 7}, after 4 attempts'),
    ],
)
def test_what_does_not_pass_is_given_up_with_what_it_was(bad, said):
    slept = []
    with serving(in_turn(BAD[bad])) as server, pytest.raises(CallFailed) as error:
        ask(server.url, slept=slept)
    assert len(server.requests) == 4
    assert str(error.value) == f"{server.url}/v1: {said}"
    assert len(slept) == 3
    for number, seconds in enumerate(slept):  # doubled, and between half and all of that
        assert 0.005 * 2**number <= seconds <= 0.01 * 2**number


def test_waits_are_doubled_up_to_the_longest():
    slept = []
    patience = Patience(attempts=9, wait=1, longest=10)
    with serving(in_turn(BAD["503"])) as server, pytest.raises(CallFailed):
        ask(server.url, slept=slept, patience=patience)
    assert all(most / 2 <= seconds <= most for seconds, most in zip(slept, [1, 2, 4, 8, 10, 10, 10, 10], strict=True))


@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_how_long_to_wait(status):
    at = email.utils.formatdate(time.time() + 60, usegmt=True)
    replies = [Reply(b"", status, {"Retry-After": after}) for after in ("7", "0.5", at, "soon")]
    slept = []
    with serving(in_turn(*replies, GOOD)) as server:
        assert ask(server.url, slept=slept, patience=Patience(attempts=5, wait=0.01)) == 7
    assert slept[:2] == [7, 0.5]
    assert slept[2] == pytest.approx(60, abs=5)  # dates have whole seconds, and the machine may be busy
    assert slept[3] <= 0.08


def test_a_wait_that_is_too_long_is_not_begun():
    slept = []
    with serving(in_turn(Reply(b"", 429, {"Retry-After": "86400"}))) as server:
        with pytest.raises(CallFailed, match="429 Too Many Requests; it asks to be left alone for 86,400 s"):
            ask(server.url, slept=slept)
        assert len(server.requests) == 1
    assert slept == []


def test_a_slow_server_is_asked_again():
    slow = [True, False]

    def answer(request):
        if slow.pop(0):
            server.release.wait(5)
        return GOOD

    with serving(answer) as server:
        assert ask(server.url) == 7
        assert len(server.requests) == 2
        slow[:] = [True] * 4
        with pytest.raises(CallFailed, match=r"no reply within 0\.4 s, after 4 attempts"):
            ask(server.url)


def test_nobody_listens():
    url = f"http://127.0.0.1:{closed_port()}/v1"
    with pytest.raises(CallFailed, match=r"the connection broke \(Connection refused\), after 4 attempts"):
        ask(url)
    with pytest.raises(EndpointError, match=f"^cannot reach {url}: Connection refused$"):
        Endpoint(url).check()


@pytest.mark.parametrize(("status", "kind"), [(400, CallFailed), (422, CallFailed), (401, EndpointError)])
def test_what_will_not_pass_is_not_tried_again(status, kind):
    with serving(in_turn(Reply({"error": "no"}, status))) as server, pytest.raises(kind):
        ask(server.url)
    assert len(server.requests) == 1


def test_a_model_that_is_missing():
    reply = Reply({"error": {"message": "The model 'x' does not exist", "type": "NotFoundError"}}, 404)
    with serving(in_turn(reply)) as server, pytest.raises(EndpointError) as error:
        ask(server.url)
    assert str(error.value) == (
        f"{server.url}/v1 has no such model, or is no such address (404 Not Found: The model 'x' does not exist)"
    )
    assert not isinstance(error.value, CallFailed), "no other call would succeed"


def test_a_redirect_is_not_followed(monkeypatch):
    """Its POST would become a GET, and the key would go to whoever it names."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(in_turn(GOOD)) as other:
        redirect = Reply(b"", 307, {"Location": f"{other.url}/v1"})
        with serving(in_turn(redirect)) as server:
            with pytest.raises(EndpointError, match=f"redirects to {other.url}/v1: give that address"):
                ask(server.url)
            server.models = redirect
            with pytest.raises(EndpointError, match="redirects to"):
                Endpoint(server.url).check()
        assert not other.requests


def test_a_check_is_content_with_any_server():
    for reply in (Reply(b"", 404), Reply(b"?", 500), Reply(b"<html>"), Reply(b"", 400), Reply({"data": []})):
        with serving(in_turn(GOOD)) as server:
            server.models = reply
            Endpoint(server.url).check()


# ---------------------------------------------------------------- the key


def test_the_key_is_sent_and_never_shown(monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    echo = Reply({"error": {"message": f"bad key\n\x1b[31m{KEY} in your request"}}, 400)
    refused = Reply({"error": {"message": f"wrong key: {KEY[:8]}***{KEY[-4:]}"}}, 401)
    with serving(in_turn(GOOD, echo, refused)) as server:
        options = {"key_variable": "MY_KEY"}
        assert ask(server.url, **options) == 7
        assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
        errors = []
        for _ in range(2):
            with pytest.raises(EndpointError) as error:
                ask(server.url, **options)
            errors.append(str(error.value))
        assert errors == [
            f"{server.url}/v1: 400 Bad Request: bad key [31m… in your request",
            f"{server.url}/v1 refuses the key in MY_KEY (401)",
        ]
        assert KEY not in repr(Endpoint(server.url, **options))
        server.models = refused
        with pytest.raises(EndpointError, match=r"refuses the key in MY_KEY \(401\)"):
            Endpoint(server.url, **options).check()
    assert KEY not in caplog.text


def test_a_key_that_is_missing_or_broken(monkeypatch):
    with pytest.raises(ConfigError, match=r"no key for https://api\.example\.com/v1: set .* OPENAI_API_KEY"):
        Endpoint("https://api.example.com")
    with pytest.raises(ConfigError, match=r"MY_KEY, or name another with --judge-key-variable"):
        Endpoint("http://localhost:1", option="--judge", key_variable="MY_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ConfigError, match="the key in OPENAI_API_KEY has blanks") as error:
        Endpoint("https://api.example.com")
    assert "secret" not in str(error.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    wanted = pytest.raises(EndpointError, match=r"wants a key: set OPENAI_API_KEY \(401\)")
    with serving(in_turn(Reply(b"", 401))) as server, wanted:
        ask(server.url)


def test_a_default_key_does_not_go_to_another_machine_in_the_clear(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MY_KEY", KEY)
    with caplog.at_level("INFO", logger="crispedit"):
        assert Endpoint("http://192.0.2.1/v1")._key is None
    assert "no key is sent to http://192.0.2.1/v1 over plain http" in caplog.text
    assert Endpoint("http://192.0.2.1/v1", key_variable="MY_KEY")._key == KEY
    assert Endpoint("https://192.0.2.1/v1")._key == KEY
    assert Endpoint("http://localhost:8000")._key == KEY


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    with serving(in_turn(GOOD)) as server:
        assert ask(server.url) == 7


# ---------------------------------------------------------------- the address


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/chat/completions", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/completions/", "http://localhost:8000/v1"),
        ("https://api.example.com/chat/completions", "https://api.example.com"),
        ("https://example.com/openai", "https://example.com/openai/v1"),
        ("https://example.com/v1beta/openai/", "https://example.com/v1beta/openai"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
        (" http://localhost:8000 ", "http://localhost:8000/v1"),
    ],
)
def test_addresses_with_and_without_version_and_route(given, found):
    assert base_address(given, "--judge") == found


@pytest.mark.parametrize(
    "given",
    ["localhost:8000", "ftp://a/v1", "http://", "http://a:99999", "http://a b/", "http://ä.example", "http://a:b"],
)
def test_what_is_no_address(given):
    with pytest.raises(ConfigError, match="--judge is no address of a server: it must look like http://localhost:8000"):
        base_address(given, "--judge")


@pytest.mark.parametrize("given", ["http://me:pass@host/v1", "https://host/v1?key=pass", "https://host/v1#pass"])
def test_secrets_do_not_belong_into_an_address(given):
    with pytest.raises(ConfigError, match="no name, password or query") as error:
        base_address(given, "--judge")
    assert "pass@" not in str(error.value)
    assert "=pass" not in str(error.value)
