"""Downloads from a server that misbehaves, and what becomes of the files. All on this machine."""

import gzip
import hashlib
import http.server
import json
import threading
import time
import urllib.request

import numpy as np
import pytest

import data.download
import data.gpt2
from data.download import SOURCES, File, NoteHash, fetch, get
from data.files import read_conversations, read_preferences, read_prompts, read_text, read_texts
from gpt import InputError

CONTENT = bytes(range(256)) * 2000
HASH = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /whole, /ranges, /cut, /moved, /tagged, /pointer, /login ...: what a server may do.

    While `everything` is not empty, that kind of answer comes to whatever is asked for.
    """

    asked, everything = [], ""

    def do_GET(self):
        kind, wanted = self.everything or self.path[1:], self.headers.get("Range")
        self.asked.append((kind, wanted))
        if kind in ("moved", "tagged", "mistagged"):
            self.send_response(302)
            self.send_header("Location", "/ranges")
            if kind != "moved":
                self.send_header("X-Linked-Etag", f'"{HASH if kind == "tagged" else "0" * 64}"')
            return self.end_headers()
        body, start = CONTENT, 0
        if kind == "pointer":
            body = b"version https://git-lfs.github.com/spec/v1\n"
        if kind == "login":  # as a hotel or an office sends it, with status 200
            body, wanted = b"\n<!DOCTYPE html><html><body>Please log in.</body></html>", None
        body = {"empty": b"", "marked": b"text<b>text</b>"}.get(kind, body)
        if wanted and kind != "whole":
            first, last = wanted.removeprefix("bytes=").split("-")
            start, body = int(first), body[int(first) : int(last) + 1 if last else None]
            if not body:
                return self.send_error(416)
        self.send_response(206 if wanted and kind != "whole" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind in ("cut", "stall") and start == 0:
            self.wfile.write(body[:100_000])
            if kind == "stall":
                self.wfile.flush()
                time.sleep(1.5)
            return None
        self.wfile.write(body)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_whole_file_gets_its_name_and_is_not_fetched_again(server, tmp_path):
    fetch(File(f"{server}/whole", HASH), tmp_path / "deep" / "file")
    assert (tmp_path / "deep" / "file").read_bytes() == CONTENT
    Handler.asked.clear()
    fetch(File(f"{server}/whole", HASH), tmp_path / "deep" / "file")
    assert not Handler.asked and len(list((tmp_path / "deep").iterdir())) == 1


def test_redirection_is_followed(server, tmp_path):
    fetch(File(f"{server}/moved", HASH), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_gits_own_hash_of_a_small_file_is_no_sha256():
    note, request = NoteHash(), urllib.request.Request("http://a/b")
    for tag, noted in (("abc", ""), (HASH, HASH)):
        headers = {"X-Linked-ETag": f'"{tag}"'}
        note.redirect_request(request, None, 302, "", headers, "http://a/c")
        assert note.sha256 == noted


def test_a_first_part_has_no_hash_to_be_checked(server, tmp_path):
    fetch(File(f"{server}/tagged"), tmp_path / "file", megabytes=0.2)
    assert (tmp_path / "file").read_bytes() == CONTENT[:200_000]


def test_megabytes_are_of_the_largest_file_that_the_source_has(tmp_path, monkeypatch):
    asked = []

    def fetch_nothing(file, path, megabytes):
        asked.append((file.url, megabytes))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(shard([1]) if path.suffix == ".bin" else b"a")

    monkeypatch.setattr(data.download, "fetch", fetch_nothing)
    get("tinystories", tmp_path, 50)
    assert asked == [(data.download.ALL_STORIES.url, 50)]
    for megabytes, shards in ((10, 1), (500, 2), (10**6, 103)):
        asked.clear()
        get("fineweb", tmp_path, megabytes)
        assert len(asked) == 1 + shards and "val_000000" in asked[0][0]


def test_hash_that_the_server_names_is_checked(server, tmp_path):
    fetch(File(f"{server}/tagged"), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    with pytest.raises(InputError, match=f"mistagged: sha256 is {HASH}, not 0000"):
        fetch(File(f"{server}/mistagged"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_download_that_broke_off_goes_on_where_it_stopped(server, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(data.download, "TIMEOUT", 0.5)
    with pytest.raises(InputError, match=f"{kind}.*(timed out|connection ended after 100,000 of)"):
        fetch(File(f"{server}/{kind}", HASH), tmp_path / "file")
    assert not (tmp_path / "file").exists()
    kept = (tmp_path / "file.part").stat().st_size
    assert 0 < kept <= 100_000
    fetch(File(f"{server}/{kind}", HASH), tmp_path / "file")
    assert Handler.asked[-1] == (kind, f"bytes={kept}-")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_server_without_ranges_starts_again_from_the_beginning(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"an old part")
    fetch(File(f"{server}/whole", HASH), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_part_that_is_already_whole_is_enough(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    fetch(File(f"{server}/ranges", HASH), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["ranges", "whole"])
def test_first_megabytes_are_a_beginning_of_that_length(server, tmp_path, kind):
    fetch(File(f"{server}/{kind}"), tmp_path / "file", megabytes=0.2)
    assert (tmp_path / "file").read_bytes() == CONTENT[:200_000]


def test_wrong_content_is_deleted_and_named(server, tmp_path):
    with pytest.raises(InputError, match="whole: sha256 is .*, not 1234: it has changed"):
        fetch(File(f"{server}/whole", "1234"), tmp_path / "file")
    with pytest.raises(InputError, match="the server sent a Git LFS pointer instead of"):
        fetch(File(f"{server}/pointer"), tmp_path / "file")
    with pytest.raises(InputError, match="the server sent an empty page instead of the file"):
        fetch(File(f"{server}/empty"), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_login_page_takes_no_place_of_a_part(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    with pytest.raises(InputError, match="login: the server sent a web page instead of the file"):
        fetch(File(f"{server}/login", HASH), tmp_path / "file")
    fetch(File(f"{server}/ranges", HASH), tmp_path / "file")
    assert Handler.asked[-1] == ("ranges", "bytes=1000-")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("start", [b"<html>", b"\xef\xbb\xbf\n <?xml ", b"<!-- -->", b"  <script>"])
def test_page_that_has_the_name_of_a_file_is_refused(server, tmp_path, start):
    (tmp_path / "file").write_bytes(start + b"x" * 5000)
    with pytest.raises(InputError, match="file is a web page instead of the file. Delete it"):
        fetch(File(f"{server}/ranges", HASH), tmp_path / "file")


@pytest.mark.parametrize("start", [b"<|endoftext|>Once", b"< 3 and > 2", b"{}", b"PK", b" "])
def test_what_is_no_page_is_not_taken_for_one(tmp_path, start):
    (tmp_path / "file").write_bytes(start)
    fetch(File("http://127.0.0.1:9/file"), tmp_path / "file")  # nobody listens there


def test_what_a_part_goes_on_with_may_look_like_a_page(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"text")
    fetch(File(f"{server}/marked"), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"text<b>text</b>"
    assert Handler.asked[-1] == ("marked", "bytes=4-")


@pytest.mark.parametrize("name", SOURCES)
def test_login_page_in_place_of_any_source_is_not_kept(server, tmp_path, monkeypatch, name):
    """Text, JSON, JSON lines, gzip, tokens: the next try has to find nothing in its way."""
    monkeypatch.setattr(Handler, "everything", "login")
    files = [
        file._replace(url=f"{server}/{file.url.split('/')[-1]}") for file in SOURCES[name].files
    ]
    monkeypatch.setitem(SOURCES, name, SOURCES[name]._replace(files=files))
    with pytest.raises(InputError, match="the server sent a web page instead of the file"):
        get(name, tmp_path)
    assert list((tmp_path / name).iterdir()) == []


def test_login_page_in_place_of_weights_is_not_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "everything", "login")
    monkeypatch.setattr(data.gpt2, "URL", f"{server}/{{file}}")
    monkeypatch.setattr(data.gpt2, "DOWNLOADS", tmp_path)
    with pytest.raises(InputError, match="the server sent a web page instead of the file"):
        data.gpt2.download("gpt2")
    assert list((tmp_path / "gpt2").iterdir()) == []


@pytest.mark.parametrize("kind", ["ranges", "whole"])
def test_more_megabytes_than_before_are_fetched_and_fewer_are_there(server, tmp_path, kind):
    path = tmp_path / "file"
    for megabytes in (0.1, 0.3):
        fetch(File(f"{server}/{kind}"), path, megabytes)
        assert path.read_bytes() == CONTENT[: int(megabytes * 1e6)]
    assert Handler.asked[-1] == (kind, "bytes=100000-299999")  # what is new
    count = len(Handler.asked)
    fetch(File(f"{server}/{kind}"), path, 0.2)
    path.rename(f"{path}.part")  # as if a larger download had been stopped
    fetch(File(f"{server}/{kind}"), path, 0.2)
    assert path.read_bytes() == CONTENT[:300_000] and len(Handler.asked) == count
    fetch(File(f"{server}/{kind}"), path, 50)  # more than there is
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]


def test_no_network_says_what_was_tried_and_where_to_put_the_file(tmp_path):
    url = "http://127.0.0.1:9/file"  # nobody listens there
    with pytest.raises(InputError, match=f"cannot download {url}.*by hand and save it as .*file"):
        fetch(File(url), tmp_path / "file")


def test_every_source_is_complete_and_unknown_names_are_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["download", "--list"])
    data.download.main()
    listed = capsys.readouterr().out
    for name, source in SOURCES.items():
        assert name in listed and source.licence in listed
        assert source.files and "{folder}" in source.command
    with pytest.raises(InputError, match="there is no source 'c4'; there are tinyshakespeare, "):
        get("c4", tmp_path)
    with pytest.raises(InputError, match="--megabytes is for tinystories and fineweb"):
        get("dolly", tmp_path, megabytes=1)


def lay(tmp_path, name, *contents):
    """Put files where `get` looks for what it has downloaded already, and convert them."""
    folder = tmp_path / name
    folder.mkdir()
    for file, content in zip(SOURCES[name].files, contents):
        text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
        path = folder / file.url.split("/")[-1]
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    for _ in range(2):  # the second time, all is there already
        get(name, tmp_path)
    return folder


def test_demonstrations_are_rows_for_sft(tmp_path):
    row = {"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "x"}
    folder = lay(tmp_path, "dolly", [row, {**row, "response": " "}])
    rows = read_conversations(folder / "databricks-dolly-15k.jsonl")
    assert [m["content"] for m in rows[0]["messages"]] == ["Add.\n1 and 2", "3"] and len(rows) == 1
    problem = {"question": "1+1?", "answer": "1+1=2\n#### 2"}
    folder = lay(tmp_path, "gsm8k", [problem], [problem, problem])
    (row,) = read_conversations(folder / "rows.jsonl")
    assert row["messages"][1]["content"].endswith("#### 2")
    assert len(read_prompts(folder / "test_rows.jsonl")) == 2


def test_documents_are_text_for_pretraining(tmp_path):
    folder = lay(tmp_path, "tinystories", "One.<|endoftext|>Two.<|endoftext|>Thr")
    assert read_text(folder / "stories.txt") == "One.<|endoftext|>Two."
    folder = lay(tmp_path, "lambada", [{"text": "a b"}, {"text": "c d"}])
    assert read_texts(folder / "lambada_test.jsonl") == ["a b", "c d"]


def shard(tokens) -> bytes:
    """A file of token ids as the source of fineweb has them."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


def test_token_shards_become_one_file_for_training_and_one_for_validation(tmp_path):
    folder = tmp_path / "fineweb"
    folder.mkdir()
    for name, tokens in (
        ("val_000000", [7, 8]),
        ("train_000001", [1, 2, 3]),
        ("train_000002", [4]),
    ):
        (folder / f"fineweb_{name}.bin").write_bytes(shard(tokens))
    get("fineweb", tmp_path, megabytes=400)  # two shards
    assert np.fromfile(folder / "train.bin", np.uint16).tolist() == [1, 2, 3, 4]
    assert np.fromfile(folder / "val.bin", np.uint16).tolist() == [7, 8]
    (folder / "fineweb_val_000000.bin").write_bytes(shard([7] * (10**6 + 5)))
    get("fineweb", tmp_path)
    assert len(np.fromfile(folder / "val.bin", np.uint16)) == 10**6
    assert np.fromfile(folder / "train.bin", np.uint16).tolist() == [1, 2, 3]
    (folder / "fineweb_train_000001.bin").write_bytes(shard([1, 2, 3])[:-1])
    with pytest.raises(
        InputError, match="fineweb_train_000001.bin: .*is it truncated.*Delete .*val_00"
    ):
        get("fineweb", tmp_path)
    (folder / "fineweb_train_000001.bin").write_bytes(b"something else" * 100)
    with pytest.raises(
        InputError, match="fineweb_train_000001.bin is not a shard.*Delete .*val_00"
    ):
        get("fineweb", tmp_path)
    assert np.fromfile(folder / "train.bin", np.uint16).tolist() == [1, 2, 3]  # as it was


def test_new_tokens_leave_those_alone_that_a_run_has_mapped(tmp_path):
    folder = tmp_path / "fineweb"
    folder.mkdir()
    mapped = []
    for token in (1, 2):
        for name in ("val_000000", "train_000001"):
            (folder / f"fineweb_{name}.bin").write_bytes(shard([token] * 3 * token))
        get("fineweb", tmp_path)
        mapped += [np.memmap(folder / name, np.uint16, "r") for name in ("val.bin", "train.bin")]
    assert [tokens.tolist() for tokens in mapped] == [[1] * 3, [1] * 3, [2] * 6, [2] * 6]


@pytest.mark.parametrize("name", ["gsm8k", "helpsteer2", "oasst1"])
@pytest.mark.parametrize("row", [{"error": "log in"}, {"prompt": "log in"}, {"prompt": None}])
def test_rows_of_another_form_are_a_clear_error(tmp_path, name, row):
    with pytest.raises(InputError, match=f"{name}: not what it should be .*Delete .*{name}"):
        lay(tmp_path, name, [row], [row])


def test_preferences_are_pairs_for_rm_and_dpo(tmp_path):
    row = {"prompt": "Hi", "response_1": "one", "response_2": "two"}
    rows = [{**row, "preference_strength": strength} for strength in (-2, 0, 3)]
    pairs = read_preferences(lay(tmp_path, "helpsteer2", rows) / "pairs.jsonl")
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("one", "two"), ("two", "one")]
    dialogue = "\n\nHuman: Hi\n\nAssistant: "
    pair = {"chosen": dialogue + "Hello.", "rejected": dialogue + "No."}
    folder = lay(tmp_path, "hh-rlhf", [pair], [pair])
    assert read_preferences(folder / "train.jsonl.gz")[0]["chosen"] == "Hello."


def test_trees_become_best_replies_and_pairs_of_neighbours_in_rank(tmp_path):
    def reply(text, rank, *replies, **more):
        return dict(role="assistant", text=text, rank=rank, replies=list(replies), **more)

    follow_up = dict(role="prompter", text="Why?", replies=[reply("So.", 0)])
    replies = [reply("worse", 1), reply("best", 0, follow_up), reply("worst", 2)]
    replies += [reply("gone", 3, deleted=True), reply("unranked", None)]
    tree = {"prompt": dict(role="prompter", text="Hi", lang="en", replies=replies)}
    other = {"prompt": dict(role="prompter", text="Hallo", lang="de", replies=replies)}
    folder = lay(tmp_path, "oasst1", [tree, other])
    pairs = read_preferences(folder / "pairs.jsonl")
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("best", "worse"), ("worse", "worst")]
    rows = [
        [m["content"] for m in row["messages"]] for row in read_conversations(folder / "rows.jsonl")
    ]
    assert rows == [["Hi", "best"], ["Hi", "best", "Why?", "So."]]
