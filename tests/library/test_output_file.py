import pytest

from lightning_custom.errors import ConfigError
from lightning_custom.output_file import require_ending, write_file


def test_a_file_of_another_kind_is_refused(tmp_path):
    require_ending(tmp_path / "a.gif", (".png", ".gif"))
    with pytest.raises(ConfigError, match=r"^out: .*a\.jpg does not end in \.png or \.gif; choose another with --out$"):
        require_ending(tmp_path / "a.jpg", (".png", ".gif"))


def test_content_is_written_and_a_place_that_cannot_be_written_is_named(tmp_path):
    write_file(tmp_path / "a.png", b"content")
    assert (tmp_path / "a.png").read_bytes() == b"content"
    with pytest.raises(ConfigError, match=r"^out: cannot write .*a\.png \(No such file or directory\); choose another"):
        write_file(tmp_path / "none" / "a.png", b"")
