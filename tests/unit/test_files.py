"""Files are replaced whole, and no link is followed."""

import os

import pytest

from tidar.config.files import create_file, open_regular, parse_json, write_atomically


def test_links_are_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(victim)
    write_atomically(link, "näw")
    assert victim.read_text() == "precious" and link.read_text(encoding="utf-8") == "näw" and not link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "victim"]
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "made")
    with pytest.raises(FileExistsError):
        create_file(dangling)
    assert not (tmp_path / "made").exists()


def test_what_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "device").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"x"
    for name in ("link", "device", "pipe", "."):
        with pytest.raises(OSError):
            open_regular(tmp_path / name)


def test_deeply_nested_json_is_a_value_error():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)
