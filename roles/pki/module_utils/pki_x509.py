"""What the modules of role pki share. Hosts have Debian 12's cryptography 38, the control machine perhaps a newer one."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    MISSING = ""
    # extended key usages by the names that the role's variables use
    USAGES = {"serverAuth": ExtendedKeyUsageOID.SERVER_AUTH, "clientAuth": ExtendedKeyUsageOID.CLIENT_AUTH}
except ImportError as error:
    MISSING = f"Python there has no cryptography ({error}); install it, on Debian as python3-cryptography."
    USAGES = {}


class Problem(Exception):
    """What stops, in a sentence."""


def write(path: Path, data: bytes, mode: int) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        os.fchmod(stream.fileno(), mode)
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


def moment(thing: Any, name: str) -> datetime:
    """A date of a certificate or list, as UTC; cryptography has it so since version 42."""
    value: datetime = getattr(thing, f"{name}_utc") if hasattr(thing, f"{name}_utc") else getattr(thing, name).replace(tzinfo=UTC)
    return value


def _blocks(text: str, kind: str) -> list[bytes]:
    end = f"-----END {kind}-----"
    return [(part[part.index("-----BEGIN") :] + end + "\n").encode() for part in text.split(end)[:-1]]


def certificates(text: str) -> list[x509.Certificate]:
    """Those in a text."""
    return [x509.load_pem_x509_certificate(block) for block in _blocks(text, "CERTIFICATE")]


def lists(text: str) -> list[x509.CertificateRevocationList]:
    """The revocation lists in a text."""
    return [x509.load_pem_x509_crl(block) for block in _blocks(text, "X509 CRL")]


def pem(thing: Any) -> bytes:
    """A certificate, request or revocation list as text."""
    data: bytes = thing.public_bytes(serialization.Encoding.PEM)
    return data


def public(thing: Any) -> bytes:
    """The public key of a certificate or key, to compare."""
    data: bytes = thing.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return data


def common_name(name: x509.Name) -> str:
    """The common name in a name."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def revoked(entry: x509.CertificateRevocationList, certificate: x509.Certificate) -> bool:
    """Whether a certificate is on a list."""
    return entry.issuer == certificate.issuer and entry.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None


def issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether this CA signed it, and may."""
    key, signature, signed, digest = (
        ca.public_key(),
        certificate.signature,
        certificate.tbs_certificate_bytes,
        certificate.signature_hash_algorithm,
    )
    if certificate.issuer != ca.subject or digest is None:
        return False
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, signed, padding.PKCS1v15(), digest)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, signed, ec.ECDSA(digest))
        else:
            return False
        return ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (InvalidSignature, x509.ExtensionNotFound):
        return False
