//! The places at which bytes of a peer, of an OCI runtime or of CRIU come in,
//! for `crates/hostile`.

use std::{fs::File, io, path::Path};

use crate::{
    Amendments, Remembered,
    amend::opt,
    conversation::{self, Said},
    fields::Fields,
    packet::Packet,
    tar,
};

/// A packet of CRIU's RPC in either direction: what it means, and what an
/// amendment makes of it.
pub fn packet(bytes: &[u8]) {
    if let Ok(Said::Notification(said)) = conversation::read(&Packet::new(bytes.to_vec())) {
        assert!(said.pid.is_none_or(|pid| pid > 0));
    }
    let Ok(mut request) = Fields::parse(bytes) else { return };
    assert_eq!(request.encode(), bytes, "what is not understood keeps its bytes");
    let _ = conversation::decode_options(&request);
    let amended = request.edit_all(conversation::REQ_OPTS, |options| {
        let (mut kept, mut sent) = (Vec::new(), Vec::new());
        let mut amendments = Amendments::new(options, &mut kept, &mut sent);
        Remembered { tcp_close: true, link_remap: true, ..Default::default() }
            .apply(&mut amendments);
        amendments.external("mnt[]");
        assert_eq!(options.varint(opt::TCP_CLOSE), Some(1));
    });
    if amended.is_ok() {
        assert!(Fields::parse(&request.encode()).is_ok());
    }
}

/// As the restore of a tmpfs has it done.
pub fn extract(archive: &File, dir: &Path) -> io::Result<()> {
    tar::extract::extract(archive, dir)
}

/// The archive that the dump makes of a directory, for a corpus.
pub fn archive(dir: &Path, archive: &File) -> io::Result<()> {
    tar::create::create(dir, archive)
}
