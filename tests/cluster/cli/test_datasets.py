"""The data commands, run from their arguments."""

from pathlib import Path

import pytest

from cluster.cli.app import main


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_a_log_is_imported_by_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{u},{(u + e) % 6},{10 * e + u}" for u in range(6) for e in range(6)]
    (tmp_path / "log.csv").write_text("\n".join(["who,what,timestamp", *rows]))
    source, out = str(tmp_path / "log.csv"), str(tmp_path / "shop")
    assert "--column user=NAME" in fails(["data", "import", source, out], capsys)
    assert "no column role 'whom'" in fails(
        ["data", "import", source, out, "--column", "whom=who"], capsys
    )
    assert "role=NAME" in fails(["data", "import", source, out, "--column", "who"], capsys)
    twice = ["--column", "user=who", "--column", "user=what"]
    assert "names user twice" in fails(["data", "import", source, out, *twice], capsys)
    assert "choose chronological" in fails(["data", "import", source, out, "--split", "x"], capsys)
    assert not (tmp_path / "shop").exists()
    main(["data", "import", source, out, "--column", "user=who", "--column", "item=what"])
    shown = capsys.readouterr().out
    assert "num_events  36" in shown
    assert f"orchard data sids {out}" in shown
    pytest.importorskip("faiss", reason="faiss is not installed; `make env` brings it")
    assert "choose auto, titles" in fails(["data", "sids", out, "--source", "x"], capsys)
    assert "not a list of sizes" in fails(["data", "sids", out, "--levels", "2x2"], capsys)
    main(["data", "sids", out, "--levels", "2,2", "--collisions", "extra_level"])
    shown = capsys.readouterr().out
    assert "6 distinct of 6 items, 0 share an ID" in shown
    assert f"tokenizer bundle: {out}/sids" in shown
    encode = ["data", "encode", f"{out}/sids", f"{out}/items.parquet", f"{out}/again.parquet"]
    assert "cannot embed an item by itself" in fails([*encode, "--verify"], capsys)
    vectors = f"{out}/embeddings.parquet"
    main([*encode, "--verify", "--append", "--embeddings", vectors])
    shown = capsys.readouterr().out
    assert "6 items have a semantic ID of the bundle and keep it" in shown
    assert "6 of 6 items that the bundle was made from get the same semantic ID again" in shown


def test_the_import_says_what_it_did_and_fills_the_working_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        f"{u};{(u + e) % 6};{1_600_000_000 + 10 * e + u};{e % 2};5"
        for u in range(6)
        for e in range(6)
    ]
    (tmp_path / "log.csv").write_text("\n".join(["userId;movieId;date;click;stars", *rows]))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    arguments = ["data", "import", "../log.csv", "."]
    assert "pass --labels positive to drop them" in fails(arguments, capsys)
    assert "choose positive or all" in fails([*arguments, "--labels", "some"], capsys)
    assert "is not known" in fails([*arguments, "--encoding", "klingon"], capsys)
    main([*arguments, "--labels", "all"])
    shown = capsys.readouterr().out
    assert "user from `userId` (a guess), item from `movieId` (a guess)" in shown
    assert "ignored: stars" in shown
    assert "separated by semicolons" in shown
    assert (tmp_path / "here" / "train.parquet").is_file()
    main([*arguments, "--labels", "positive", "--overwrite"])
    assert "events_with_label_0  18" in capsys.readouterr().out
