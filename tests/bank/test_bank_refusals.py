"""Damaged, foreign and misplaced files are refused with what was found, expected and to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weft
from bank.banking import files_under, images, make_base, make_model, outputs
from weft.bank import Bank, documents
from weft.bank.tensors import read_tensors
from weft.errors import BankError

FILES = (
    "bank.json",
    "tasks/a/bundle.json",
    "tasks/a/own.safetensors",
    "tasks/a/head.safetensors",
    "shared",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank with two jointly trained tasks."""
    folder = tmp_path_factory.mktemp("original")
    Bank(folder).save(make_model(make_base(), method="hard_sharing"))
    return folder


@pytest.fixture
def bank(original: Path, tmp_path: Path) -> Bank:
    """A copy of it."""
    shutil.copytree(original, tmp_path / "bank")
    return Bank(tmp_path / "bank")


def find(bank: Bank, file: str) -> Path:
    """A file of the bank by its short name."""
    return next((bank.path / file).iterdir()) if file == "shared" else bank.path / file


def refused(bank: Bank, *tasks: str) -> str:
    """The message with which loading is refused; the other tasks still load."""
    with pytest.raises(BankError) as caught:
        Bank(bank.path).load(make_base(), *tasks)
    return str(caught.value)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.999])
def test_truncated_files_are_refused(bank: Bank, file: str, share: float) -> None:
    path = find(bank, file)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    message = refused(bank, "a")
    assert str(path) in message
    assert "cut short" in message
    assert "Restore it from a copy, or" in message
    assert bank.verify()


@pytest.mark.parametrize("file", FILES)
def test_flipped_bits_are_refused(bank: Bank, file: str) -> None:
    path = find(bank, file)
    data = path.read_bytes()
    step = max(1, len(data) // 40)
    for at in [*range(0, min(32, len(data)), 3), *range(0, len(data), step), len(data) - 1]:
        altered = bytearray(data)
        altered[at] ^= 1 << (at % 8)
        path.write_bytes(altered)
        if file.endswith("json") and json_equal(data, altered):
            continue  # white space at the end
        message = refused(bank, "a")
        assert str(path) in message, message
        assert "Restore it from a copy, or" in message, message
    assert any(str(path) in problem.text for problem in bank.verify())


def json_equal(one: bytes, other: bytes) -> bool:
    return one.rstrip() == bytes(other).rstrip()


@pytest.mark.parametrize("file", FILES)
def test_missing_files_are_refused(bank: Bank, file: str) -> None:
    path = find(bank, file)
    path.unlink()
    message = refused(bank, "a")
    assert "missing" in message or "has no bank.json" in message
    assert bank.verify()
    if file.startswith("tasks"):
        assert torch.is_tensor(outputs(bank.load(make_base(), "b"), images())["b"])
        assert [p.task for p in bank.verify()] == ["a"]


def test_without_the_hash_check_sizes_and_tables_still_hold(bank: Bank) -> None:
    own = find(bank, "tasks/a/own.safetensors")
    data = bytearray(own.read_bytes())
    data[-1] ^= 1
    own.write_bytes(data)
    bank.load(make_base(), "a", verify=False)
    save_file({"0.weight": torch.zeros(6, 3, 3, 3)}, own)
    with pytest.raises(BankError, match=r"found \d+ bytes, expected \d+"):
        bank.load(make_base(), "a", verify=False)


def test_files_of_another_task_are_refused(bank: Bank) -> None:
    for file in ("own", "head"):
        path = bank.path / "tasks" / "a" / f"{file}.safetensors"
        before = path.read_bytes()
        path.write_bytes((bank.path / "tasks" / "b" / path.name).read_bytes())
        assert "SHA-256" in refused(bank, "a")
        path.write_bytes(before)
    shutil.rmtree(bank.path / "tasks" / "a")
    shutil.copytree(bank.path / "tasks" / "b", bank.path / "tasks" / "a")
    assert "is the bundle of 'b', expected 'a'" in refused(bank, "a")
    assert [p.task for p in bank.verify()] == ["a"]


def test_a_bundle_of_another_base_is_refused(bank: Bank, tmp_path: Path) -> None:
    torch.manual_seed(9)
    stranger = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3))
    other = Bank(tmp_path / "other")
    other.save(make_model(stranger, "c"))
    shutil.copytree(other.path / "tasks" / "c", bank.path / "tasks" / "c")
    message = refused(bank, "c")
    assert "belongs to another base than this bank" in message
    assert "copied from another bank" in message
    # The bank that holds it knows too, once it knows the values of its base.
    bank.save(make_model(make_base(), "d"))
    assert [p.task for p in bank.verify()] == ["c"]


def other_bases() -> Iterator[tuple[str, nn.Module, str]]:
    base = make_base()
    with torch.no_grad():
        base[3].bias[0] += 1
    base[1].momentum = 0.5
    yield "values", base, r"1 tensor has other values \(3.bias\)"
    yield (
        "types",
        make_base().double(),
        r"8 tensors have other shapes or types \(0.wei",
    )
    base = make_base()
    base[3] = nn.Conv2d(6, 5, 3, bias=False)
    yield (
        "shapes",
        base,
        r"1 tensor is missing \(3.bias\); 1 tensor has.*\[5, 6, 3, 3\]",
    )
    base = make_base().append(nn.Linear(2, 2))
    yield "new", base, r"2 tensors are new \(4.weight, 4.bias\)"


@pytest.mark.parametrize(
    ("base", "message"), [c[1:] for c in other_bases()], ids=[c[0] for c in other_bases()]
)
def test_another_base_is_refused_with_the_tensors_that_differ(
    base: nn.Module, message: str, tmp_path: Path
) -> None:
    bank = Bank(tmp_path)
    bank.save(make_model(make_base()))
    with pytest.raises(BankError, match=message + ".*allow_other_base=True"):
        bank.load(base)
    with pytest.raises(BankError, match=message):
        bank.save(make_model(base) if "new" not in message else make_wide(base))
    assert bank.verify(base)
    assert not bank.verify(make_base())


def make_wide(base: nn.Module) -> Any:
    model = weft.MultiTaskModel(base, weft.linear_probe(base))
    model.add_task("a", weft.Task(head=None, loss=torch.sum))
    return model


def test_another_base_can_be_allowed_if_the_tensors_fit(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    model = make_model(make_base(), method="full_finetune")
    bank.save(model)
    base = make_base()
    with torch.no_grad():
        base[0].weight += 1
    loaded = bank.load(base, allow_other_base=True)
    x = images()
    assert torch.equal(outputs(loaded, x)["a"], outputs(model, x)["a"])
    probe = make_model(base, "x", method="linear_probe")
    with pytest.raises(BankError, match="other values"):
        bank.add_to(probe, "a")
    bank.add_to(probe, "a", allow_other_base=True)
    assert torch.equal(outputs(probe, x)["a"], outputs(model, x)["a"])
    base[3] = nn.Conv2d(6, 6, 3)
    with pytest.raises(BankError, match=r"does not fit this base: '3.weight' is float32 \[6, 3"):
        bank.load(base, allow_other_base=True)


def test_the_base_of_a_model_is_compared_again_after_it_changed(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    bank.save(make_model(make_base()))
    base = make_base()
    model = bank.load(base, "a")
    with torch.no_grad():
        base[0].weight.add_(1)  # the model works on this memory
    with pytest.raises(BankError, match=r"1 tensor has other values \(0.weight\)"):
        bank.add_to(model, "b")


def test_newer_formats_are_refused(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, kind in (("bank.json", "bank"), ("tasks/a/bundle.json", "bundle")):
        path = bank.path / file
        content = json.loads(path.read_text())
        before = path.read_bytes()
        monkeypatch.setattr(documents, "VERSION", 7)
        own = ("format", "version", "checksum")
        path.write_bytes(documents.render(kind, {k: v for k, v in content.items() if k not in own}))
        monkeypatch.undo()
        assert "format version 7; this weft reads up to 1. Upgrade it: pip" in refused(bank, "a")
        path.write_bytes(before)


def test_documents_of_another_kind_or_shape_are_refused(bank: Bank) -> None:
    path = bank.path / "tasks" / "a" / "bundle.json"
    path.write_bytes((bank.path / "bank.json").read_bytes())
    assert "is a 'weft bank', expected a 'weft bundle'" in refused(bank, "a")
    path.write_bytes(documents.render("bundle", {"task": "a"}))
    assert "not made as this weft makes them" in refused(bank, "a")
    path.write_bytes(b"[" * 100_000)
    assert "does not match its checksum" in refused(bank, "a")


def test_an_edited_document_is_refused(bank: Bank) -> None:
    path = bank.path / "tasks" / "a" / "bundle.json"
    path.write_text(path.read_text().replace('"fraction": 0.1', '"fraction": 0.2'))
    assert "edited by hand" in refused(bank, "a")


def test_unrelated_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    bank = Bank(tmp_path)
    with pytest.raises(BankError, match=r"no bank and not empty \(it has 'notes.txt'\)"):
        bank.save(make_model(make_base()))
    for call in (bank.tasks, lambda: bank.load(make_base()), lambda: len(bank), bank.prune):
        with pytest.raises(BankError, match=r"is no bank: it has no bank.json"):
            call()
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(BankError, match="not a folder"):
        Bank(tmp_path / "notes.txt").save(make_model(make_base()))


def test_a_lost_bank_file_is_made_again_by_saving(bank: Bank) -> None:
    (bank.path / "bank.json").unlink()
    bank.save(make_model(make_base(), "c"))
    assert set(bank.tasks()) == {"a", "b", "c"}
    assert not bank.verify(make_base())


# --------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["../a", "a/b", "..", ".", "", "/tmp/x", "a\\b", "x\0y", ".old"])
def test_names_cannot_leave_the_folder(bank: Bank, name: str) -> None:
    for call in (bank.info, bank.remove, lambda n: bank.load(make_base(), n)):
        with pytest.raises(BankError):
            call(name)
    assert name not in bank


def test_links_are_not_followed(bank: Bank, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(bank.path / "tasks" / "a", outside)
    (bank.path / "tasks" / "link").symlink_to(outside)
    assert bank.tasks() == ("a", "b")
    with pytest.raises(BankError, match="symbolic link, which a bank does not follow"):
        bank.load(make_base(), "link")
    assert [p.task for p in bank.verify()] == ["link"]
    with pytest.raises(BankError, match="symbolic link"):
        bank.save(make_model(make_base(), "link", method="hard_sharing"))
    for file in FILES:
        path = find(bank, file)
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
        assert "symbolic link" in refused(bank, "a")
        path.unlink()
        (tmp_path / "moved").rename(path)
    for folder in ("tasks", "shared"):
        (bank.path / folder).rename(tmp_path / "moved")
        (bank.path / folder).symlink_to(tmp_path / "moved")
        assert "symbolic link" in refused(bank, "a")
        with pytest.raises(BankError, match="symbolic link"):
            bank.save(make_model(make_base(), "a", method="hard_sharing"))
        (bank.path / folder).unlink()
        (tmp_path / "moved").rename(bank.path / folder)
    bank.load(make_base(), "a")


def test_strange_entries_are_reported_and_not_listed(bank: Bank) -> None:
    (bank.path / "tasks" / "notes.txt").write_text("mine")
    (bank.path / "tasks" / "what?").mkdir()
    assert bank.tasks() == ("a", "b")
    assert [p.task for p in bank.verify()] == ["notes.txt", "what?"]
    assert all(str(p).startswith(p.task) for p in bank.verify())
    with pytest.raises(BankError, match=r"is in the way"):
        bank.save(make_model(make_base(), "notes.txt", method="hard_sharing"))


@pytest.mark.parametrize(("first", "second"), [("Flowers", "flowers"), ("stra\u00dfe", "STRASSE")])
def test_names_that_differ_by_case_only_are_refused(
    first: str, second: str, tmp_path: Path
) -> None:
    base = make_base()
    bank = Bank(tmp_path)
    bank.save(make_model(base, first))
    before = files_under(tmp_path)
    with pytest.raises(BankError, match="differs from it by case"):
        bank.save(make_model(base, second))
    assert files_under(tmp_path) == before
    shutil.copytree(tmp_path / "tasks" / first, tmp_path / "tasks" / second)
    assert "by case only" in str([str(p) for p in bank.verify()])


# -------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("seed", range(3))
def test_any_altered_tensor_file_is_refused_even_without_its_hash(
    seed: int, tmp_path: Path
) -> None:
    """The reader of tensors meets any bytes with a result or a `BankError`, never with a crash."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0, 4)}, path)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(150):
        altered = bytearray(data)
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            at = int(torch.randint(0, len(data), (), generator=generator))
            altered[at] = int(torch.randint(0, 256, (), generator=generator))
        path.write_bytes(altered)
        recorded = {"bytes": len(data), "sha256": ""}
        try:
            tensors = read_tensors(path, recorded, verify=False)
        except BankError:
            continue
        assert all(torch.is_tensor(t) for t in tensors.values())


HEADER: dict[str, Any] = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "header",
    [
        None,
        3,
        "x",
        [],
        [1],
        {"a": None},
        {"a": [0, 8]},
        {"a": {**HEADER["a"], "dtype": []}},
        {"a": {**HEADER["a"], "shape": "x"}},
        {"a": {**HEADER["a"], "shape": {"x": 1}}},
        {"a": {**HEADER["a"], "shape": [[2]]}},
        {"a": {**HEADER["a"], "shape": [2.0]}},
        {"a": {**HEADER["a"], "data_offsets": "xy"}},
        {**HEADER, "__metadata__": 3},
        {**HEADER, "__metadata__": "x"},
        {**HEADER, "__metadata__": ["x"]},
        {**HEADER, "__metadata__": {"weft": 3}},
        {**HEADER, "__metadata__": {"weft": "["}},
        {**HEADER, "__metadata__": {"weft": "[" * 100_000}},
        *(
            {**HEADER, "__metadata__": {"weft": json.dumps(forms)}}
            for forms in (
                [],
                3,
                "x",
                {"w": 3},
                {"w": []},
                {"w": {}},
                {"w": {"shape": [2]}},
                {"w": {"shape": [2], "gaps": "a", "values": "a"}},
                {"w": {"shape": [2], "bits": "a", "values": "a"}},
                {"w": {"shape": [2], "bits": ["a"]}},
                {"w": {"shape": 2, "gaps": "b", "values": "a"}},
                {"w": {"shape": ["x"], "gaps": "a", "values": "a"}},
            )
        ),
    ],
    ids=lambda header: repr(header)[-60:],
)
def test_crafted_headers_of_tensor_files_are_refused(header: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(8)
    path.write_bytes(data)
    with pytest.raises(BankError, match=r"holds no tensors \(.*Restore it from a copy"):
        read_tensors(path, {"bytes": len(data), "sha256": ""}, verify=False)
