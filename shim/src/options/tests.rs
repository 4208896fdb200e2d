use super::*;

fn any(name: &str, value: Vec<u8>) -> Any {
    Any { type_url: name.into(), value, ..Default::default() }
}

#[test]
fn nothing_means_the_defaults() {
    assert_eq!(RuntimeOptions::decode(None).unwrap(), RuntimeOptions::default());
    let empty = Any::default();
    assert_eq!(RuntimeOptions::decode(Some(&empty)).unwrap(), RuntimeOptions::default());
    assert_eq!(CheckpointOptions::decode(Some(&empty)).unwrap(), None);
}

#[test]
fn runc_options_are_taken_whole() {
    let sent = oci::Options {
        no_pivot_root: true,
        no_new_keyring: true,
        shim_cgroup: "/shims".into(),
        io_uid: 7,
        io_gid: 8,
        binary_name: "crun".into(),
        root: "/r".into(),
        systemd_cgroup: true,
        criu_image_path: "/i".into(),
        criu_work_path: "/w".into(),
        task_api_address: "unix:///s".into(),
        task_api_version: 3,
        ..Default::default()
    };
    let bytes = sent.write_to_bytes().unwrap();
    for name in ["containerd.runc.v1.Options", "type.googleapis.com/containerd.runc.v1.Options"] {
        let got = RuntimeOptions::decode(Some(&any(name, bytes.clone()))).unwrap();
        let wanted = RuntimeOptions {
            no_pivot_root: true,
            no_new_keyring: true,
            shim_cgroup: "/shims".into(),
            io_uid: 7,
            io_gid: 8,
            binary_name: "crun".into(),
            root: "/r".into(),
            systemd_cgroup: true,
            criu_image_path: "/i".into(),
            criu_work_path: "/w".into(),
            task_api_address: "unix:///s".into(),
            task_api_version: 3,
        };
        assert_eq!(got, wanted, "{name}");
    }
}

/// The bytes of `containerd.linux.runc.CreateOptions{NoPivotRoot: true,
/// ShimCgroup: "/a", IoUid: 1000, CriuWorkPath: "/w", CriuImagePath: "/i"}`.
#[test]
fn the_old_create_options_have_other_numbers() {
    let bytes = b"\x08\x01\x4a\x02/a\x50\xe8\x07\x62\x02/w\x6a\x02/i".to_vec();
    let got =
        RuntimeOptions::decode(Some(&any("containerd.linux.runc.CreateOptions", bytes))).unwrap();
    let wanted = RuntimeOptions {
        no_pivot_root: true,
        shim_cgroup: "/a".into(),
        io_uid: 1000,
        criu_work_path: "/w".into(),
        criu_image_path: "/i".into(),
        ..Default::default()
    };
    assert_eq!(got, wanted);
}

/// `{Exit: true, FileLocks: true, 8: "/eight", 9: "/nine"}` in both types.
#[test]
fn the_two_checkpoint_types_swap_their_paths() {
    let bytes = b"\x08\x01\x28\x01\x42\x06/eight\x4a\x05/nine".to_vec();
    let decode = |name| {
        CheckpointOptions::decode(Some(&any(name, bytes.clone()))).unwrap().expect("options")
    };
    let new = decode("containerd.runc.v1.CheckpointOptions");
    assert_eq!((new.image_path.as_str(), new.work_path.as_str()), ("/eight", "/nine"));
    let old = decode("containerd.linux.runc.CheckpointOptions");
    assert_eq!((old.image_path.as_str(), old.work_path.as_str()), ("/nine", "/eight"));
    assert!(new.exit && new.file_locks && old.exit && old.file_locks);
}

#[test]
fn toml_comes_from_a_path_or_in_the_message() {
    let text = "BinaryName = \"crun\"\nsystemd_cgroup = true\nIoUid = 12\nOther = 1\n";
    let wanted = RuntimeOptions {
        binary_name: "crun".into(),
        systemd_cgroup: true,
        io_uid: 12,
        ..Default::default()
    };
    let file = std::env::temp_dir().join(format!("transship-options-{}.toml", std::process::id()));
    fs::write(&file, format!("[options]\n{text}")).unwrap();
    let by_path = Configured {
        type_url: "dev.transship.Options".into(),
        config_path: file.to_str().unwrap().into(),
        config_body: Vec::new(),
    };
    let in_body = Configured { config_body: text.into(), ..Default::default() };
    for sent in [by_path, in_body] {
        let sent = any("runtimeoptions.v1.Options", sent.encode_to_vec());
        assert_eq!(RuntimeOptions::decode(Some(&sent)).unwrap(), wanted);
    }
    fs::remove_file(file).unwrap();
}

#[test]
fn what_is_not_known_or_not_sound_is_an_invalid_argument() {
    let wrong_type = Configured { config_body: b"IoUid = \"x\"".to_vec(), ..Default::default() };
    let no_file = Configured { config_path: "/nowhere/at/all".into(), ..Default::default() };
    for (sent, wanted) in [
        (any("example.Options", vec![]), "example.Options"),
        (any("containerd.runc.v1.Options", vec![0xff]), "containerd.runc.v1.Options"),
        (any("runtimeoptions.v1.Options", wrong_type.encode_to_vec()), "configuration body"),
        (any("runtimeoptions.v1.Options", no_file.encode_to_vec()), "/nowhere/at/all"),
    ] {
        let error = RuntimeOptions::decode(Some(&sent)).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{error:?}");
        assert!(error.to_string().contains(wanted), "{error} lacks {wanted}");
    }
    let error = CheckpointOptions::decode(Some(&any("example.Options", vec![]))).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument(_)));
}

#[test]
fn options_survive_in_the_bundle() {
    let bundle = std::env::temp_dir().join(format!("transship-bundle-{}", std::process::id()));
    fs::create_dir_all(&bundle).unwrap();
    assert_eq!(RuntimeOptions::load(&bundle).unwrap(), RuntimeOptions::default());
    let options = RuntimeOptions { binary_name: "crun".into(), io_gid: 3, ..Default::default() };
    options.save(&bundle).unwrap();
    assert_eq!(RuntimeOptions::load(&bundle).unwrap(), options);
    // containerd's own shim omits what is empty.
    fs::write(bundle.join(OPTIONS_FILE), r#"{"root":"/r"}"#).unwrap();
    assert_eq!(RuntimeOptions::load(&bundle).unwrap().root, "/r");
    fs::remove_dir_all(bundle).unwrap();
}
