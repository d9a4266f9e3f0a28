"""Certificates that must be refused, and revocation lists, signed by the lab's own CA; its passphrase comes on standard input."""

import argparse
import sys
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = timedelta(days=1)
NOW = datetime.now(UTC)
# file -> common name, begin and end of validity
CASES = {
    "expired": ("gw1", NOW - 2 * DAY, NOW - DAY),
    "not-yet-valid": ("gw1", NOW + DAY, NOW + 2 * DAY),
    "mallory": ("mallory", NOW - DAY, NOW + DAY),
    "revoked": ("gw1", NOW - DAY, NOW + DAY),
    # what a swap brings: good, and told from the present one by its serial number
    "good": ("gw1", NOW - DAY, NOW + DAY),
}


def main() -> None:
    """Write NAME.crt and NAME.key for each case, and revoked.crl, in which the revoked one stands."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ca", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--address", type=ip_address, required=True, help="of gw1, by which clients find it")
    arguments = parser.parse_args()
    ca = x509.load_pem_x509_certificate((arguments.ca / "ca.crt").read_bytes())
    ca_key = serialization.load_pem_private_key((arguments.ca / "ca.key").read_bytes(), sys.stdin.read().strip().encode())
    arguments.output.mkdir(parents=True, exist_ok=True)
    revoked = []
    for name, (common_name, begin, end) in CASES.items():
        addresses = [x509.IPAddress(arguments.address)] if common_name == "gw1" else []
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(ca.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(common_name), *addresses]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        if name.endswith("revoked"):
            revoked.append(certificate.serial_number)
        (arguments.output / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (arguments.output / f"{name}.key").write_bytes(pem)
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.subject).last_update(NOW - DAY).next_update(NOW + 30 * DAY)
    for serial in revoked:
        builder = builder.add_revoked_certificate(x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW - DAY).build())
    (arguments.output / "revoked.crl").write_bytes(builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


main()
