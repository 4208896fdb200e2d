//! A CA of one's own in two commands: `init-ca`, then `issue` for the nodes;
//! and `revoke`, for a key that fell into other hands.
//!
//! The CA's key stays where it was made; only what `issue` writes goes to a
//! node. Nothing is ever overwritten: a second CA in the place of the first
//! would turn every node away.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use thiserror::Error;
use time::{Duration, OffsetDateTime};
use transship_link::Credentials;
use transship_types::{DOMAIN, InvalidName, NodeName};
use zeroize::Zeroizing;

use crate::config::is_address;

mod revocation;

pub use revocation::revoke;

/// Ten years: whoever replaces a CA must reach every node.
const CA_LIFE: Duration = Duration::days(3650);
/// Two years: a node's certificate is one command away.
const NODE_LIFE: Duration = Duration::days(730);
/// Clocks of two nodes may differ.
const SKEW: Duration = Duration::hours(1);

/// A node that gets a certificate, and where it will listen if that is known:
/// `NODE` or `NODE@HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub node: NodeName,
    pub address: Option<String>,
}

impl FromStr for Member {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (node, address) = match text.split_once('@') {
            Some((node, address)) => (node, Some(address)),
            None => (text, None),
        };
        if let Some(address) = address.filter(|address| !is_address(address)) {
            return Err(format!("the address {address:?} is not of the form HOST:PORT"));
        }
        let node = node.parse().map_err(|error: InvalidName| error.to_string())?;
        Ok(Self { node, address: address.map(str::to_owned) })
    }
}

#[derive(Debug, Error)]
pub enum AuthorityError {
    #[error("{} exists already and is not overwritten", .0.display())]
    Exists(PathBuf),
    #[error("there is no CA in {}; make one with `transshipd init-ca`", .0.display())]
    NoCa(PathBuf),
    #[error("{} cannot be used", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the certificate could not be made")]
    Certificate(#[from] rcgen::Error),
    #[error("{} cannot be read: {why}", path.display())]
    Unreadable { path: PathBuf, why: String },
    #[error("{whose:?} is no file with a certificate, and {} has none of a node of that name", dir.display())]
    NothingIssued { whose: String, dir: PathBuf },
    #[error("{} is not of the CA in {}", path.display(), dir.display())]
    OtherCa { path: PathBuf, dir: PathBuf },
}

/// Makes `ca.pem` and `ca.key` (0600) in `dir`.
pub fn init(dir: &Path) -> Result<(), AuthorityError> {
    make_dir(dir)?;
    let (certificate, key) = (dir.join("ca.pem"), dir.join("ca.key"));
    refuse_existing(&[&certificate, &key])?;
    let pair = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = named("Transship CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = OffsetDateTime::now_utc() - SKEW;
    params.not_after = OffsetDateTime::now_utc() + CA_LIFE;
    let pem = Zeroizing::new(pair.serialize_pem());
    let issuer = CertifiedIssuer::self_signed(params, pair)?;
    write_new(&key, &pem, 0o600)?;
    write_new(&certificate, &issuer.pem(), 0o644)
}

/// Makes a node's certificate and key and puts them, with the CA's
/// certificate, into `out`: everything that node needs.
pub fn issue(dir: &Path, node: &NodeName, out: &Path) -> Result<Credentials, AuthorityError> {
    let (ca, issuer) = authority(dir)?;
    make_dir(out)?;
    let made = Credentials {
        ca: out.join("ca.pem"),
        certificate: out.join("node.pem"),
        key: out.join("node.key"),
        crl: None,
    };
    refuse_existing(&[&made.certificate, &made.key])?;
    let pair = KeyPair::generate()?;
    // The second name is for its shims (`TICKET.NODE.DOMAIN`).
    let names = [format!("{node}.{DOMAIN}"), format!("*.{node}.{DOMAIN}")];
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = named(&format!("Transship node {node}"));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.not_before = OffsetDateTime::now_utc() - SKEW;
    params.not_after = OffsetDateTime::now_utc() + NODE_LIFE;
    let certificate = params.signed_by(&pair, &issuer)?;
    write_new(&made.key, &Zeroizing::new(pair.serialize_pem()), 0o600)?;
    write_new(&made.certificate, &certificate.pem(), 0o644)?;
    // Who knows what there is can revoke it without having it.
    let issued = dir.join(revocation::ISSUED);
    make_dir(&issued)?;
    let serial = revocation::serial(certificate.der())?;
    write_new(&issued.join(format!("{node}.{serial}.pem")), &certificate.pem(), 0o644)?;
    // In the CA's own directory it is there already; so it is on a node whose
    // certificate is renewed.
    match write_new(&made.ca, &ca, 0o644) {
        Err(AuthorityError::Exists(path)) if fs::read_to_string(&path).is_ok_and(|t| t == ca) => {}
        other => other?,
    }
    Ok(made)
}

/// Writes the configuration of `member` into `out`: where it listens, and
/// where the others are.
pub fn write_config(out: &Path, member: &Member, all: &[Member]) -> Result<(), AuthorityError> {
    let mut text = format!("# Node {}; `transshipd --help` names every key.\n", member.node);
    if let Some((_, port)) = member.address.as_ref().and_then(|address| address.rsplit_once(':')) {
        text.push_str(&format!("listen = \"0.0.0.0:{port}\"\n"));
    }
    for other in all.iter().filter(|other| other.node != member.node) {
        if let Some(address) = &other.address {
            text.push_str(&format!("\n[peers.{}]\naddress = \"{address}\"\n", other.node));
        }
    }
    write_new(&out.join("config.toml"), &text, 0o644)
}

/// The CA's certificate, and what signs for it.
fn authority(dir: &Path) -> Result<(String, Issuer<'static, KeyPair>), AuthorityError> {
    let ca = read(&dir.join("ca.pem"), dir)?;
    let key = Zeroizing::new(read(&dir.join("ca.key"), dir)?);
    let issuer = Issuer::from_ca_cert_pem(&ca, KeyPair::from_pem(&key)?)?;
    Ok((ca, issuer))
}

fn named(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

fn make_dir(dir: &Path) -> Result<(), AuthorityError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| file(dir, e))
}

fn refuse_existing(paths: &[&PathBuf]) -> Result<(), AuthorityError> {
    match paths.iter().find(|p| p.exists()) {
        Some(path) => Err(AuthorityError::Exists(path.to_path_buf())),
        None => Ok(()),
    }
}

fn read(path: &Path, dir: &Path) -> Result<String, AuthorityError> {
    fs::read_to_string(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => AuthorityError::NoCa(dir.into()),
        _ => file(path, e),
    })
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), AuthorityError> {
    let mut made = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(
        |e| match e.kind() {
            io::ErrorKind::AlreadyExists => AuthorityError::Exists(path.into()),
            _ => file(path, e),
        },
    )?;
    made.write_all(text.as_bytes()).and_then(|()| made.sync_all()).map_err(|e| file(path, e))
}

fn file(path: &Path, source: io::Error) -> AuthorityError {
    AuthorityError::File { path: path.into(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tempfile::TempDir;
    use tokio::net::{TcpListener, TcpStream};
    use transship_link::{Trust, accept, connect_agent};

    use super::*;

    fn node(name: &str) -> NodeName {
        name.parse().unwrap()
    }

    #[tokio::test]
    async fn two_commands_make_two_nodes_trust_each_other() {
        let dir = TempDir::new().unwrap();
        init(dir.path()).unwrap();
        let trust = |name: &str| {
            let made = issue(dir.path(), &node(name), &dir.path().join(name)).unwrap();
            Trust::load(&made).unwrap()
        };
        let (a, b) = (trust("a"), trust("b"));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let to = node("b");
        let serve = async {
            let (stream, _): (TcpStream, _) = listener.accept().await.unwrap();
            accept(&b, stream).await.unwrap().peer
        };
        let (at_a, at_b) = tokio::join!(connect_agent(&a, &address, &to), serve);
        assert_eq!((at_a.unwrap().peer, at_b), (node("b"), node("a")));
    }

    #[test]
    fn keys_are_private_and_nothing_is_overwritten() {
        let dir = TempDir::new().unwrap();
        init(dir.path()).unwrap();
        issue(dir.path(), &node("a"), &dir.path().join("a")).unwrap();
        for key in ["ca.key", "a/node.key"] {
            let mode = fs::metadata(dir.path().join(key)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{key}");
        }
        let before = fs::read(dir.path().join("ca.pem")).unwrap();
        assert!(matches!(init(dir.path()), Err(AuthorityError::Exists(_))));
        assert_eq!(fs::read(dir.path().join("ca.pem")).unwrap(), before);
        let again = issue(dir.path(), &node("a"), &dir.path().join("a"));
        assert!(matches!(again, Err(AuthorityError::Exists(_))));
    }

    #[test]
    fn the_written_configuration_names_the_others() {
        let dir = TempDir::new().unwrap();
        let all: Vec<Member> =
            ["a@10.0.0.1:7430", "b@[fd00::2]:7431", "c"].map(|text| text.parse().unwrap()).into();
        write_config(dir.path(), &all[0], &all).unwrap();
        let config = crate::config::Config::load(Some(&dir.path().join("config.toml"))).unwrap();
        assert_eq!(config.listen, "0.0.0.0:7430");
        let peers: Vec<_> = config.peers.iter().map(|(n, p)| (n.as_str(), &*p.address)).collect();
        assert_eq!(peers, [("b", "[fd00::2]:7431")]);
        for wrong in ["A@10.0.0.1:1", "a@", "a@host", "@h:1", ""] {
            assert!(wrong.parse::<Member>().is_err(), "{wrong:?}");
        }
    }

    /// By name: all there are. By file: that one, as after a renewal.
    #[test]
    fn who_is_revoked_is_refused_and_stays_so() {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.path().join(name);
        init(dir.path()).unwrap();
        let [a, b, renewed] = [("a", "a"), ("b", "b"), ("a", "a2")]
            .map(|(of, to)| issue(dir.path(), &node(of), &at(to)).unwrap());
        let good = |files: &Credentials| {
            let crl = Some(at("crl.pem"));
            Trust::load(&Credentials { crl, ..files.clone() }).unwrap().vet().is_ok()
        };
        let old = a.certificate.to_str().unwrap();
        assert_eq!(revoke(dir.path(), old).unwrap().len(), 1);
        assert_eq!([&a, &b, &renewed].map(good), [false, true, true]);
        let number = |n: u64| {
            let (revoked, number) = revocation::present(&at("crl.pem")).unwrap();
            assert_eq!((revoked.len() as u64, number), (n, n));
        };
        number(1);
        let said = revoke(dir.path(), "a").unwrap();
        assert!(said.len() == 1 && said[0].contains("node a"), "the other was before: {said:?}");
        assert_eq!([&a, &b, &renewed].map(good), [false, true, false]);
        number(2);
    }

    #[test]
    fn only_what_this_ca_has_issued_can_be_revoked() {
        let (dir, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        for ca in [&dir, &other] {
            init(ca.path()).unwrap();
        }
        let theirs = issue(other.path(), &node("a"), &other.path().join("a")).unwrap();
        let theirs = theirs.certificate.to_str().unwrap();
        for (whose, why) in
            [("a", "none of a node"), ("/nowhere", "no file"), (theirs, "not of the CA")]
        {
            let error = revoke(dir.path(), whose).unwrap_err();
            assert!(error.to_string().contains(why), "{whose}: {error}");
        }
        assert!(!dir.path().join("crl.pem").exists(), "nothing was written");
    }

    #[test]
    fn without_a_ca_the_remedy_is_named() {
        let dir = TempDir::new().unwrap();
        let error = issue(dir.path(), &node("a"), &dir.path().join("a")).unwrap_err();
        assert!(error.to_string().contains("init-ca"), "{error}");
        assert!(!dir.path().join("a").exists());
    }
}
