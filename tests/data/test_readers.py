from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from qwha_cli import catalog
from qwha_cli.data import alpaca, chat, gsm8k, jsonl, prose, text, wikitext
from qwha_cli.data.calibration import read_examples, read_text
from qwha_cli.data.example import Example, Segment
from qwha_cli.data.fingerprint import fingerprint
from qwha_cli.data.split import train_validation
from qwha_cli.data.tokenize import encode
from qwha_cli.errors import DataError
from support.tiny_model import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _chat(path: Path, *turns: tuple[str, str]) -> Path:
    return _write(path, {"messages": [{"role": role, "content": content} for role, content in turns]})


def test_gsm8k_has_the_papers_prompt_and_no_calculator_marks(tmp_path: Path) -> None:
    answer = "Natalia sold 48/2 = <<48/2=24>>24 clips.\nIn all $<<24+48=72>>1,072.\n#### 1,072"
    file = _write(tmp_path / "train.jsonl", {"question": "How many?", "answer": answer})
    (example,) = gsm8k.read(str(file), split="train")
    instruction = "Answer the above question. First think step by step and then answer the final number."
    assert example.prompt == f"How many?\n{instruction}\n"
    assert example.response == "Natalia sold 48/2 = 24 clips.\nIn all $1,072.\nThe final answer is: 1072"
    assert example.answer == "1072"
    assert [segment.trained for segment in example.segments] == [False, True]


def test_gsm8k_reads_every_real_problem(shared_data: Path) -> None:
    for split, count in (("train", 7473), ("test", 1319)):
        examples = gsm8k.read(str(shared_data / "gsm8k"), split=split)
        assert len(examples) == count
        for example in examples:
            assert example.response.endswith(f"\nThe final answer is: {example.answer}")
            assert "<<" not in example.response
            assert "####" not in example.response
            assert float(str(example.answer)) == int(float(str(example.answer)))
    assert len(gsm8k.read(str(shared_data / "gsm8k"), split="train", limit=7)) == 7


def test_alpaca_reads_real_examples(shared_data: Path) -> None:
    examples = alpaca.read(str(shared_data / "alpaca" / "roleplay.json"), split="train")
    assert len(examples) == 3146
    assert all(example.prompt.endswith("\n\n### Response:\n") for example in examples)


def test_alpaca_mentions_an_input_only_where_there_is_one_and_leaves_braces_alone(tmp_path: Path) -> None:
    with_input = {"instruction": "Explain {input} and {0}.", "input": "x = {}", "output": "A dict."}
    file = _write(tmp_path / "data.jsonl", with_input, {"instruction": "Sing.", "output": "La."})
    first, second = alpaca.read(str(file), split="train")
    assert "### Instruction:\nExplain {input} and {0}.\n\n### Input:\nx = {}\n\n### Response:\n" in first.prompt
    assert "### Input:" not in second.prompt
    assert second.response == "La."


def test_jsonl_takes_prompt_and_response_or_text_unchanged(tmp_path: Path) -> None:
    file = _write(tmp_path / "data.jsonl", {"prompt": "a ", "response": " b", "answer": 3}, {"text": "c\u2028d"})
    first, second = jsonl.read(str(file), split="train")
    assert (first.prompt, first.response, first.answer) == ("a ", " b", "3")
    assert second == Example((Segment("c\u2028d", True),))


def test_every_turn_of_the_assistant_is_trained_in_the_tokenizers_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = (("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2"))
    (example,) = chat.read(str(_chat(tmp_path / "chat.jsonl", *turns)), split="train", tokenizer=tokenizer)
    assert [(s.text, s.trained) for s in example.segments] == [
        ("<|system|>S<eos>\n<|user|>U1<eos>\n<|assistant|>", False),
        ("A1<eos>\n", True),
        ("<|user|>U2<eos>\n<|assistant|>", False),
        ("A2<eos>", True),
    ]
    # the template's end mark is the end token: no second one
    ids = encode(example, tokenizer).input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[-2] != tokenizer.eos_token_id


def test_a_template_that_rewrites_earlier_turns_trains_the_last_one_only(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}[{{ m['content'] }}]{% endif %}{% endfor %}"
    )
    turns = (("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2"))
    (example,) = chat.read(str(_chat(tmp_path / "chat.jsonl", *turns)), split="train", tokenizer=tokenizer)
    assert [(s.text, s.trained) for s in example.segments] == [("[U1][U2]", False), ("[A2]", True)]


def test_a_conversation_without_a_template_is_written_plainly(tmp_path: Path) -> None:
    file = _chat(tmp_path / "chat.jsonl", ("user", "Hi"), ("assistant", "Ho"))
    (example,) = chat.read(str(file), split="train", tokenizer=tiny_tokenizer())
    assert (example.prompt, example.response) == ("User: Hi\nAssistant: ", "Ho\n")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"message": []}, r"'messages' must be a non-empty list \(keys here: message\)"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 0: role 'robot' is none of system, user, assistant"),
        ({"messages": [{"role": "user"}]}, "message 0: key 'content' is missing"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no turn of the assistant"),
    ],
)
def test_a_malformed_conversation_is_named(tmp_path: Path, record: object, message: str) -> None:
    good = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    file = _write(tmp_path / "chat.jsonl", good, record)
    with pytest.raises(DataError, match=message) as caught:
        chat.read(str(file), split="train")
    assert str(caught.value.where).startswith(f"{file}:2")
    assert caught.value.remedy


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = _chat(tmp_path / "chat.jsonl", ("user", "Hi"), ("assistant", "Ho"))
    with pytest.raises(DataError, match="roles must alternate") as caught:
        chat.read(str(file), split="train", tokenizer=tokenizer)
    assert caught.value.where == f"{file}:1"


READERS = {"gsm8k": gsm8k.read, "alpaca": alpaca.read, "jsonl": jsonl.read, "chat": chat.read}
# what a malformed second line of each format lacks
BROKEN = {
    "gsm8k": ({"question": "q", "answer": "no final line"}, "#### NUMBER"),
    "alpaca": ({"instruction": "i"}, "'output' is missing"),
    "jsonl": ({"prompt": "p"}, "'response' is missing"),
    "chat": ({"messages": "m"}, "must be a non-empty list"),
}
GOOD = {
    "gsm8k": {"question": "q", "answer": "a\n#### 1"},
    "alpaca": {"instruction": "i", "output": "o"},
    "jsonl": {"prompt": "p", "response": "r"},
    "chat": {"messages": [{"role": "assistant", "content": "y"}]},
}


@pytest.mark.parametrize("name", READERS)
def test_a_malformed_record_is_an_error_with_file_and_line(tmp_path: Path, name: str) -> None:
    record, message = BROKEN[name]
    file = _write(tmp_path / "data.jsonl", GOOD[name], record)
    with pytest.raises(DataError, match=message) as caught:
        READERS[name](str(file), split="train")
    assert str(caught.value.where).startswith(f"{file}:2")


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_json_or_empty_or_absent_is_an_error(tmp_path: Path, name: str) -> None:
    read = READERS[name]
    file = tmp_path / "data.jsonl"
    for content, message in (
        (json.dumps(GOOD[name]) + "\n{oops\n", "data.jsonl:2: not JSON"),
        (json.dumps(GOOD[name]) + "\n[1]\n", "data.jsonl:2: expected an object"),
        ("\n\n", "no records"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            read(str(file), split="train")
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 7\)"):
        read(str(file), split="train")
    with pytest.raises(DataError, match="no such file or folder"):
        read(str(tmp_path / "absent.jsonl"), split="train")


def test_a_json_list_names_the_index_of_a_bad_record(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([GOOD["jsonl"], {"prompt": 1, "response": "r"}]))
    with pytest.raises(DataError, match=r"data.json:\[1\]: 'prompt' must be text, found int"):
        jsonl.read(str(file), split="train")


def test_a_folder_gives_the_file_of_the_split(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", {"prompt": "p", "response": "of train"})
    _write(tmp_path / "test.jsonl", {"prompt": "p", "response": "of test"})
    assert jsonl.read(str(tmp_path), split="test")[0].response == "of test"
    with pytest.raises(DataError, match=r"no validation.jsonl or validation.json .*test.jsonl, train.jsonl"):
        jsonl.read(str(tmp_path), split="validation")


def test_a_file_whose_name_says_another_split_is_refused(tmp_path: Path) -> None:
    file = _write(tmp_path / "my-test.jsonl", GOOD["jsonl"])
    with pytest.raises(DataError, match="name says otherwise"):
        jsonl.read(str(file), split="train")
    assert jsonl.read(str(file), split="test")


@pytest.mark.parametrize(
    "read",
    [
        lambda: gsm8k.read(None, split="train"),
        lambda: alpaca.read(None, split="train"),
        lambda: wikitext.read(None, split="train"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_an_error_in_seconds(
    read: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(DataError, match="cannot download") as caught:
        read()  # type: ignore[operator]
    assert time.monotonic() - started < 5
    assert "local copy" in str(caught.value.remedy)


def test_what_is_in_the_cache_of_the_hub_is_read_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for repo, file, columns in (
        ("openai/gsm8k", "main/train-00000-of-00001.parquet", {"question": ["q"], "answer": ["a\n#### 5"]}),
        ("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet", {"text": ["", " = A = \n", "b"]}),
    ):
        cached = tmp_path / f"datasets--{repo.replace('/', '--')}"
        target = cached / "snapshots" / "abc" / file
        target.parent.mkdir(parents=True)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("abc")
        pyarrow.parquet.write_table(pyarrow.table(columns), target)
    assert gsm8k.read(None, split="train")[0].answer == "5"
    assert wikitext.read(None, split="train") == "\n\n = A = \n\n\nb"


@pytest.mark.parametrize("read", [gsm8k.read, alpaca.read, wikitext.read, prose.read])
def test_a_split_that_a_data_set_does_not_have_is_an_error(read: object) -> None:
    with pytest.raises(DataError, match="'dev'"):
        read(None, split="dev")  # type: ignore[operator]


def test_a_text_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert text.read(str(tmp_path / "a.txt"), split="train") == "one\n\ntwo"
    assert wikitext.read(str(tmp_path / "a.txt"), split="train") == "one\n\ntwo"
    assert read_text(str(tmp_path / "a.txt"), None, split="train") == "one\n\ntwo"
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="empty"):
        text.read(str(tmp_path / "a.txt"), split="train")
    for read in (text.read, jsonl.read, chat.read):
        with pytest.raises(DataError, match="needs a path"):
            read(None, split="train")


def test_the_built_in_prose_has_two_parts_that_share_no_paragraph() -> None:
    train, test = (prose.read(None, split=split) for split in ("train", "test"))
    paragraphs = [{line.strip() for line in part.splitlines() if len(line) > 60} for part in (train, test)]
    assert min(len(part) for part in paragraphs) >= 10
    assert not paragraphs[0] & paragraphs[1]
    with pytest.raises(DataError, match="takes no path"):
        prose.read("x.txt", split="train")


def test_every_data_set_and_text_of_the_catalogue_is_called_the_same_way() -> None:
    loaded = 0
    for name in catalog.DATASETS:
        with pytest.raises(DataError):
            read_examples(name, "no/such/path", split="train", seed=1, limit=2, tokenizer=None)
        loaded += 1
    for name in catalog.TEXTS:
        with pytest.raises(DataError):
            read_text(name, "no/such/path", split="train")
        loaded += 1
    assert loaded == len(catalog.DATASETS) + len(catalog.TEXTS) == 8
    with pytest.raises(DataError, match="did you mean 'gsm8k'"):
        read_examples("gsm8", None, split="train")
    with pytest.raises(DataError, match="did you mean 'wikitext2'"):
        read_text("wikitext", None, split="train")


def test_fingerprints_change_with_the_content(tmp_path: Path) -> None:
    file = _write(tmp_path / "train.jsonl", {"prompt": "p", "response": "r"})
    first, folder = fingerprint("jsonl", str(file)), fingerprint("gsm8k", str(tmp_path))
    assert fingerprint(str(file), None) == first
    _write(file, {"prompt": "p", "response": "changed"})
    assert fingerprint("jsonl", str(file)) != first
    assert fingerprint("gsm8k", str(tmp_path)) != folder
    names = {fingerprint(name, None) for name in ("synthetic", "gsm8k", "prose", "wikitext2")}
    assert len(names) == 4
    assert all(len(name) == 64 for name in names)
    with pytest.raises(DataError, match="no such file"):
        fingerprint("jsonl", str(tmp_path / "absent"))


def test_validation_is_taken_from_train_and_shares_nothing_with_it() -> None:
    examples = [Example((Segment(f"text {index % 40}", True),)) for index in range(50)]
    train, validation = train_validation(examples, size=10, seed=3)
    assert len(validation) == len(set(validation)) == 10
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == set(examples)
    assert [e for e in examples if e in set(train)] == train
    assert train_validation(examples, size=10, seed=3) == (train, validation)
    assert train_validation(examples, size=10, seed=4)[1] != validation
    assert train_validation(examples, size=0, seed=3) == (examples, [])
    with pytest.raises(DataError, match="set aside 40 of 40"):
        train_validation(examples, size=40, seed=3)
