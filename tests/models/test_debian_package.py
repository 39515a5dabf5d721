"""Fetching a Debian package without root: what happens where it cannot be had."""

import shutil
import stat

import pytest

from models import debian_package


@pytest.fixture
def path_with(tmp_path, monkeypatch):
    """Puts shell scripts, and nothing else, on PATH."""

    def install(**scripts):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, body in scripts.items():
            script = folder / name.replace("_", "-")
            script.write_text(f"#!{shell}\n{body}\n")
            script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setitem(debian_package._ENVIRONMENT, "PATH", str(folder))

    shell = shutil.which("sh")
    return install


def test_a_machine_without_apt_is_told_so(path_with, tmp_path):
    path_with()
    with pytest.raises(debian_package.FetchError, match="`apt-get` is not on this machine"):
        debian_package.fetch("some-data", tmp_path / "data" / "some-data")


def test_the_last_error_of_apt_is_the_reason(path_with, tmp_path):
    path_with(apt_get='echo "W: slow mirror" >&2; echo "E: Unable to locate package some-data" >&2; exit 100', dpkg="")
    with pytest.raises(debian_package.FetchError, match="Unable to locate package some-data"):
        debian_package.fetch("some-data", tmp_path / "data" / "some-data")


def test_nothing_is_left_behind_where_the_download_fails(path_with, tmp_path):
    path_with(
        apt_get='case "$*" in *--print-uris*) echo "\'http://x/y.deb\' some-data_1_all.deb 3 SHA256:0";; '
        '*update*) ;; *) echo "E: Hash Sum mismatch" >&2; exit 100;; esac',
        dpkg="",
    )
    with pytest.raises(debian_package.FetchError, match="Hash Sum mismatch"):
        debian_package.fetch("some-data", tmp_path / "data" / "some-data")
    assert list((tmp_path / "data").iterdir()) == []


def test_package_lists_are_read_into_a_folder_of_our_own_where_the_machine_has_none(path_with, tmp_path):
    # This apt-get finds the package only once `update` has filled the lists that its options name.
    path_with(
        apt_get="""
        for word in "$@"; do case "$word" in Dir::State::Lists=*) lists=${word#*=};; esac; done
        case "$*" in
            *update*) echo filled > "$lists/Packages";;
            *) if ! [ -e "$lists/Packages" ]; then echo "E: Unable to locate package" >&2; exit 100; fi
               case "$*" in
                   *--print-uris*) echo "'http://x/y.deb' some-data_1_all.deb 6 SHA256:0";;
                   *) echo hello > some-data_1_all.deb;;
               esac;;
        esac""",
        # `dpkg -x archive folder`; `cat` and `mkdir` are not on PATH, `read` and redirection are the shell's own.
        dpkg=f'{shutil.which("mkdir")} -p "$3/usr" && read -r line < "$2" && echo "$line" > "$3/usr/file"',
    )
    folder = debian_package.fetch("some-data", tmp_path / "data" / "some-data")
    assert (folder / "usr" / "file").read_text() == "hello\n"
    assert [path.name for path in folder.parent.iterdir()] == ["some-data"]


def test_a_package_that_is_unpacked_already_is_not_fetched_again(path_with, tmp_path):
    path_with()
    (tmp_path / "some-data").mkdir()
    assert debian_package.fetch("some-data", tmp_path / "some-data") == tmp_path / "some-data"
