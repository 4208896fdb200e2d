//! The CA's revocation list: `crl.pem` beside its certificate.
//!
//! The list grows and is signed anew each time. What it is to be trusted for
//! is decided by those who read it: `transship-link` refuses a certificate on
//! it, and goes on with a list that is out of date.

use std::{
    fs::{self, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use time::OffsetDateTime;
use transship_types::NodeName;
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

use super::{AuthorityError, CA_LIFE, SKEW, authority, file};

/// What was issued, as `NODE.SERIAL.pem`; no node has a dot in its name.
pub(super) const ISSUED: &str = "issued.d";

/// Revokes every certificate that was issued to a node, or the one in a file.
/// Answers what was revoked, for people; what was revoked before is left out.
pub fn revoke(dir: &Path, whose: &str) -> Result<Vec<String>, AuthorityError> {
    let (ca, issuer) = authority(dir)?;
    let list = dir.join("crl.pem");
    let (mut revoked, number) = present(&list)?;
    let ca = CertificateDer::from_pem_slice(ca.as_bytes()).map_err(unreadable(dir))?;
    let (_, ca) = X509Certificate::from_der(&ca).map_err(unreadable(dir))?;
    let now = OffsetDateTime::now_utc();
    let mut added = Vec::new();
    for path in meant(dir, whose)? {
        let certificate = CertificateDer::from_pem_file(&path).map_err(unreadable(&path))?;
        let (_, parsed) = X509Certificate::from_der(&certificate).map_err(unreadable(&path))?;
        // Another CA may well bear the same name.
        if parsed.verify_signature(Some(ca.public_key())).is_err() {
            return Err(AuthorityError::OtherCa { path, dir: dir.into() });
        }
        let serial_number = SerialNumber::from_slice(parsed.raw_serial());
        if revoked.iter().any(|other| other.serial_number == serial_number) {
            continue;
        }
        added.push(format!("{}, serial {}", parsed.subject(), hex(parsed.raw_serial())));
        let (reason_code, invalidity_date) = (None, None);
        revoked.push(RevokedCertParams {
            serial_number,
            revocation_time: now,
            reason_code,
            invalidity_date,
        });
    }
    let params = CertificateRevocationListParams {
        this_update: now - SKEW,
        // There is nobody who would renew it by the clock.
        next_update: now + CA_LIFE,
        crl_number: SerialNumber::from(number + 1),
        issuing_distribution_point: None,
        revoked_certs: revoked,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    replace(&list, &params.signed_by(&issuer)?.pem()?).map_err(|e| file(&list, e))?;
    Ok(added)
}

/// A certificate's serial number, as its file is named.
pub(super) fn serial(certificate: &CertificateDer<'_>) -> Result<String, AuthorityError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(unreadable(Path::new("it")))?;
    Ok(hex(parsed.raw_serial()))
}

/// The certificates that somebody has named.
fn meant(dir: &Path, whose: &str) -> Result<Vec<PathBuf>, AuthorityError> {
    let nothing = || AuthorityError::NothingIssued { whose: whose.into(), dir: dir.into() };
    let Ok(node) = whose.parse::<NodeName>() else {
        let path = PathBuf::from(whose);
        return if path.is_file() { Ok(vec![path]) } else { Err(nothing()) };
    };
    let issued = dir.join(ISSUED);
    let mut found = Vec::new();
    for entry in fs::read_dir(&issued).map_err(|_| nothing())? {
        let path = entry.map_err(|e| file(&issued, e))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.and_then(|name| name.split_once('.')).is_some_and(|(of, _)| of == node.as_str()) {
            found.push(path);
        }
    }
    found.sort();
    if found.is_empty() { Err(nothing()) } else { Ok(found) }
}

/// What the list names so far, and its number.
pub(super) fn present(list: &Path) -> Result<(Vec<RevokedCertParams>, u64), AuthorityError> {
    let bytes = match fs::read(list) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
        Err(e) => return Err(file(list, e)),
    };
    let der = CertificateRevocationListDer::from_pem_slice(&bytes).map_err(unreadable(list))?;
    let (_, parsed) = CertificateRevocationList::from_der(&der).map_err(unreadable(list))?;
    let revoked = parsed.iter_revoked_certificates().map(|one| RevokedCertParams {
        serial_number: SerialNumber::from_slice(one.raw_serial()),
        revocation_time: one.revocation_date.to_datetime(),
        reason_code: None,
        invalidity_date: None,
    });
    let digits = parsed.crl_number().map(|n| n.to_u64_digits()).unwrap_or_default();
    Ok((revoked.collect(), digits.first().copied().unwrap_or_default()))
}

/// Whole or not at all: half a list would revoke nobody.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut out = fs::File::create(&new)?;
    out.set_permissions(Permissions::from_mode(0o644))?;
    out.write_all(text.as_bytes())?;
    out.sync_all()?;
    fs::rename(&new, path)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unreadable<E: std::fmt::Display>(path: &Path) -> impl FnOnce(E) -> AuthorityError {
    move |error| AuthorityError::Unreadable { path: path.into(), why: error.to_string() }
}
