"""Certificates for tests, made with the command openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


def openssl(*arguments: str) -> None:
    """Run openssl."""
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def authority(directory: Path, name: str) -> None:
    """A CA of its own: NAME.pem and NAME.key."""
    openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
        "-keyout", f"{directory}/{name}.key", "-out", f"{directory}/{name}.pem",
    )  # fmt: skip


def certificate(
    directory: Path, name: str, *, ca: str, names: str, days: int = 2, more: str = ""
) -> None:
    """One for `names` (a subjectAltName), signed by `ca`.

    Args:
        days: how long it is valid; less than 0 for one that has expired.
        more: further lines of extensions.
    """
    (directory / "san").write_text(f"subjectAltName={names}\n{more}\n")
    openssl(
        "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
        "-keyout", f"{directory}/{name}.key", "-out", f"{directory}/{name}.csr",
    )  # fmt: skip
    openssl(
        "x509", "-req", "-in", f"{directory}/{name}.csr", "-CA", f"{directory}/{ca}.pem",
        "-CAkey", f"{directory}/{ca}.key", "-CAcreateserial",
        "-days", str(days), "-extfile", f"{directory}/san", "-out", f"{directory}/{name}.pem",
    )  # fmt: skip
