//! `dragon fetch` against a hub on this machine.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Output;
use std::sync::{Arc, Mutex};

use common::{check_refusal, command, refused, stderr};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A hub with the repository `google-t5/t5-small`, which asks for the token `secret`; notes the requests.
struct Hub {
    address: String,
    seen: Arc<Mutex<Vec<String>>>,
}

fn files() -> BTreeMap<&'static str, Vec<u8>> {
    let weights: Vec<u8> = (0..5000u32).flat_map(|i| i.to_le_bytes()).collect();
    BTreeMap::from([
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"[]".to_vec()),
        ("model.safetensors", weights),
    ])
}

fn hub(token: &'static str, tamper: bool) -> Hub {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let notes = seen.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let notes = notes.clone();
            std::thread::spawn(move || while answer(&stream, token, tamper, &notes).is_some() {});
        }
    });
    Hub { address, seen }
}

/// Answers one request; nothing when the other side has hung up.
fn answer(mut stream: &TcpStream, token: &str, tamper: bool, notes: &Mutex<Vec<String>>) -> Option<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next()?.ok()?;
    let headers: Vec<String> = lines.map_while(|line| line.ok().filter(|line| !line.is_empty())).collect();
    let header = |name: &str| {
        let found =
            headers.iter().find_map(|h| h.split_once(": ").filter(|(k, _)| k.eq_ignore_ascii_case(name)));
        found.map(|(_, value)| value.to_owned())
    };
    let range = header("range").unwrap_or_default();
    notes.lock().unwrap().push(format!("{request} {range}"));
    let path = request.split(' ').nth(1)?;
    let mut send = |status: &str, more: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{more}\r\n", body.len());
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).ok()
    };
    if header("authorization").unwrap_or_default() != format!("Bearer {token}") {
        return send("401 Unauthorized", "", b"");
    }
    if path.starts_with("/api/models/google-t5/t5-small") {
        let siblings: Vec<String> = files().keys().map(|f| format!("{{\"rfilename\": \"{f}\"}}")).collect();
        let body = format!(
            "{{\"sha\": \"{COMMIT}\", \"tags\": [\"license:apache-2.0\"], \"siblings\": [{}]}}",
            siblings.join(", ")
        );
        return send("200 OK", "Content-Type: application/json\r\n", body.as_bytes());
    }
    let name = path.strip_prefix("/google-t5/t5-small/resolve/main/").unwrap_or_default();
    let Some(bytes) = files().remove(name) else { return send("404 Not Found", "", b"") };
    let etag = sha256(&bytes);
    let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
    let from: usize = from.parse().ok()?;
    let to: usize = to.parse().unwrap_or(bytes.len() - 1);
    let mut part = bytes[from..=to].to_vec();
    if tamper && part.len() > 100 {
        part[50] ^= 1;
    }
    let more = format!(
        "ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {from}-{to}/{}\r\n",
        bytes.len()
    );
    send("206 Partial Content", &more, &part)
}

fn fetch(dir: &Path, hub: &Hub, token: &str, args: &str) -> Output {
    command(dir)
        .args(args.split_whitespace())
        .env("HF_HOME", dir.join("cache"))
        .env("HF_ENDPOINT", &hub.address)
        .env("HF_TOKEN", token)
        .output()
        .unwrap()
}

#[test]
fn a_model_is_downloaded_once_checked_and_linked() {
    let dir = tempfile::tempdir().unwrap();
    let hub = hub("secret", false);
    let looked = fetch(dir.path(), &hub, "secret", "fetch t5-small --dry-run");
    let text = String::from_utf8_lossy(&looked.stdout).into_owned();
    assert_eq!(looked.status.code(), Some(0), "{}", stderr(&looked));
    assert!(text.contains("20.0 kB  to download   model.safetensors of google-t5/t5-small"), "{text}");
    assert!(text.contains("apache-2.0"), "{text}");
    assert!(!dir.path().join("models").exists());

    // A part that an earlier download left behind is gone on with.
    let blobs = dir.path().join("cache/hub/models--google-t5--t5-small/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let weights = &files()["model.safetensors"];
    std::fs::write(blobs.join(format!("{}.part", sha256(weights))), &weights[..7000]).unwrap();
    let output = fetch(dir.path(), &hub, "secret", "fetch t5-small");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).ends_with("models/t5-small\n"));
    for (name, bytes) in files() {
        assert!(std::fs::read(dir.path().join("models/t5-small").join(name)).unwrap() == bytes, "{name}");
    }
    let from = |hub: &Hub, range: &str| {
        let seen = hub.seen.lock().unwrap();
        seen.iter().filter(|note| note.contains("model.safetensors") && note.ends_with(range)).count()
    };
    assert_eq!(from(&hub, "bytes=7000-"), 1);
    // Where Python's tools look for it.
    let snapshot = dir.path().join("cache/hub/models--google-t5--t5-small/snapshots").join(COMMIT);
    assert!(snapshot.join("model.safetensors").exists());

    let again = fetch(dir.path(), &hub, "secret", "fetch t5-small");
    let text = String::from_utf8_lossy(&again.stdout).into_owned();
    assert!(text.contains("0.0 kB of it to download"), "{text}");
    assert_eq!(from(&hub, "bytes=7000-") + from(&hub, "bytes=0-"), 1, "downloaded again");
}

#[test]
fn what_goes_wrong_is_said_with_the_files_to_put_there() {
    let dir = tempfile::tempdir().unwrap();
    refused(
        dir.path(),
        "fetch t5-huge",
        &["there is no model `t5-huge`", "t5-small", "stable-audio-open-1.0"],
    );
    let open = hub("secret", false);
    let output = fetch(dir.path(), &open, "wrong", "fetch t5-small");
    check_refusal("a wrong token", &output, &["401", "HF_TOKEN", "google-t5/t5-small", "tokenizer.json"]);
    let output = fetch(dir.path(), &open, "secret", "fetch flan-t5-small");
    check_refusal("a repository that is gone", &output, &["404", "google/flan-t5-small"]);

    let bad = hub("secret", true);
    let output = fetch(dir.path(), &bad, "secret", "fetch t5-small");
    check_refusal("a damaged file", &output, &["`model.safetensors` was damaged", "removed"]);
    let blob = sha256(&files()["model.safetensors"]);
    assert!(!dir.path().join("cache/hub/models--google-t5--t5-small/blobs").join(blob).exists());

    let gone = Hub { address: "http://127.0.0.1:9".into(), seen: open.seen.clone() };
    let output = fetch(dir.path(), &gone, "secret", "fetch clap-music");
    check_refusal("no network", &output, &["music_audioset_epoch_15_esc_90.14.pt", "models/clap-music"]);
}
