//! A CA and nodes' certificates in a temporary directory.
#![allow(dead_code)] // each test file uses its part

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tempfile::TempDir;
use time::{Duration, OffsetDateTime};
use tokio::net::{TcpListener, TcpStream};
use transship_link::{Credentials, Trust};
use x509_parser::prelude::{FromDer, X509Certificate};

pub struct Ca {
    dir: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

pub fn node(name: &str) -> transship_types::NodeName {
    name.parse().unwrap()
}

impl Ca {
    pub fn new() -> Ca {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Ca { dir, issuer }
    }

    pub fn issue(&self, node: &str) -> Credentials {
        let names = [format!("{node}.transship.internal"), format!("*.{node}.transship.internal")];
        self.issue_with(node, &names, |_| {})
    }

    pub fn issue_expired(&self, node: &str) -> Credentials {
        self.issue_with(&format!("{node}-expired"), &[format!("{node}.transship.internal")], |p| {
            p.not_before = OffsetDateTime::now_utc() - Duration::days(2);
            p.not_after = OffsetDateTime::now_utc() - Duration::days(1);
        })
    }

    pub fn issue_with(
        &self,
        file: &str,
        names: &[String],
        change: impl FnOnce(&mut CertificateParams),
    ) -> Credentials {
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let at = |end: &str| self.dir.path().join(format!("{file}{end}"));
        fs::write(at(".pem"), certificate.pem()).unwrap();
        fs::write(at(".key"), key.serialize_pem()).unwrap();
        Credentials {
            ca: self.dir.path().join("ca.pem"),
            certificate: at(".pem"),
            key: at(".key"),
            crl: None,
        }
    }

    /// A revocation list with these certificates.
    pub fn revoke(&self, file: &str, revoked: &[&Credentials]) -> PathBuf {
        let now = OffsetDateTime::now_utc();
        let revoked_certs = revoked.iter().map(|files| RevokedCertParams {
            serial_number: serial(&files.certificate),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: now - Duration::hours(1),
            next_update: now + Duration::days(1),
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let path = self.dir.path().join(format!("{file}.crl"));
        fs::write(&path, list.signed_by(&self.issuer).unwrap().pem().unwrap()).unwrap();
        path
    }

    pub fn trust(&self, node: &str) -> Trust {
        Trust::load(&self.issue(node)).unwrap()
    }
}

fn serial(certificate: &Path) -> SerialNumber {
    let der = CertificateDer::from_pem_file(certificate).unwrap();
    let (_, parsed) = X509Certificate::from_der(&der).unwrap();
    SerialNumber::from_slice(parsed.raw_serial())
}

pub async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// Both ends of one TCP connection.
pub async fn sockets() -> (TcpStream, TcpStream) {
    let (listener, address) = listen().await;
    let (connected, accepted) = tokio::join!(TcpStream::connect(&address), listener.accept());
    (connected.unwrap(), accepted.unwrap().0)
}
