//! Hostile files: whatever the bytes, the readers end in an error or in consistent arrays, without a panic and without
//! setting aside much more memory than the file has. The fuzz target `fuzz/fuzz_targets/read.rs` runs the same function.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

use dragon_metrics::files;
use proptest::prelude::*;

#[path = "../fuzz/one_input.rs"]
mod one_input;

/// Counts what this thread holds, and the most it has held.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

fn count(bytes: isize) {
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes held by `work` beyond those held before.
fn peak(work: impl FnOnce()) -> usize {
    let before = HELD.get();
    MOST.set(before);
    work();
    (MOST.get() - before).max(0) as usize
}

/// Whole fixtures and small files of our own making, the seeds of mutation.
fn seeds() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/dragon-metrics/files");
    ["f64.npy", "f16.npy", "fortran.npy", "version_3.npy", "fadtk.npz", "compressed.npz", "not_positive.npz"]
        .map(|name| std::fs::read(folder.join(name)).unwrap())
        .into()
}

/// What reading may hold besides a multiple of the file: error texts, a header, the inflater's window.
const ALLOWANCE: usize = 512 << 10;

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_files_neither_panic_nor_take_memory(
        seed in 0usize..7,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        digits in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
        doubled in any::<bool>(),
    ) {
        let mut bytes = seeds().swap_remove(seed);
        for (at, value) in &changes {
            let at = at.index(bytes.len());
            bytes[at] = *value;
        }
        // Digits in the place of digits and blanks: other shapes, other types, other versions.
        let numeric: Vec<usize> = (0..bytes.len()).filter(|&i| matches!(bytes[i], b'0'..=b'9' | b' ')).collect();
        if !numeric.is_empty() {
            for (at, digit) in &digits {
                bytes[numeric[at.index(numeric.len())]] = *digit;
            }
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if doubled {
            bytes.extend_from_within(..);
        }
        one_input::run(&bytes);
        let held = peak(|| drop((files::parse_npy(&bytes), files::parse_npz(&bytes))));
        prop_assert!(held < ALLOWANCE + 64 * bytes.len(), "{held} bytes for a file of {}", bytes.len());
    }
}

/// A `.npz` with one entry, its bytes as given.
fn npz(name: &str, entry: &[u8], method: zip::CompressionMethod) -> Vec<u8> {
    use std::io::Write;
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file(name, zip::write::SimpleFileOptions::default().compression_method(method)).unwrap();
    zip.write_all(entry).unwrap();
    zip.finish().unwrap().into_inner()
}

fn npy(shape: &str, values: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n");
    [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), values].concat()
}

#[test]
fn promises_of_headers_cost_nothing() {
    let huge = [
        "(1000000000, 1000)",
        "(99999999999, 99999999999)",
        "(18446744073709551616,)",
        "(4294967296, 4294967296)",
    ];
    for shape in huge {
        let array = npy(shape, &[0; 64]);
        for method in [zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated] {
            let archive = npz("a.mu.npy", &array, method);
            let mut message = String::new();
            let held = peak(|| message = files::parse_npz(&archive).unwrap_err());
            assert!(message.starts_with("entry `a.mu`: "), "{message}");
            assert!(held < ALLOWANCE, "{held} bytes for {shape}");
        }
        let held = peak(|| assert!(files::parse_npy(&array).is_err()));
        assert!(held < ALLOWANCE, "{held} bytes for {shape}");
    }
    let nested = npy(&"(".repeat(60_000), &[]);
    assert!(peak(|| assert!(files::parse_npy(&nested).is_err())) < ALLOWANCE);
    let inner = npz("x.npy", &npy("(2,)", &[0; 16]), zip::CompressionMethod::Stored);
    let outer = npz("y.npy", &inner, zip::CompressionMethod::Stored);
    assert_eq!(files::parse_npz(&outer).unwrap_err(), "entry `y`: not a .npy array: wrong magic number");
    assert!(
        files::parse_npz(&npz("readme.txt", b"hello", zip::CompressionMethod::Stored)).unwrap().is_empty()
    );
}

#[test]
fn what_a_file_lacks_is_said_with_its_name_and_row() {
    let folder = tempfile::tempdir().unwrap();
    let error = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        files::read_embeddings(&path, None).unwrap_err().to_string()
    };
    let stored = |entry: &[u8]| npz("x.npy", entry, zip::CompressionMethod::Stored);
    let mut flipped = stored(&npy("(1, 1)", &1.0f64.to_le_bytes()));
    let value = flipped.windows(8).position(|bytes| bytes == 1.0f64.to_le_bytes()).unwrap();
    flipped[value] ^= 1;
    for (name, bytes, want) in [
        ("flipped.npz", flipped, "entry `x`: cannot read to its end: Invalid checksum"),
        ("long.npz", stored(&npy("(1, 1)", &[0; 9])), "entry `x`: bytes follow the array"),
        ("none.npy", npy("(0, 512)", &[]), "embeddings have shape [0, 512]: it holds none"),
        ("flat.npy", npy("(3, 0)", &[]), "columns of the embeddings: expected at least 1, found 0"),
        ("inf.npy", npy("(2, 1)", &[[0; 8], f64::INFINITY.to_le_bytes()].concat()), "row 1, column 0 is inf"),
        ("short.npy", npy("(2, 2)", &[0; 31]), "needs 32 bytes, found 31"),
        ("long.npy", npy("(2, 2)", &[0; 33]), "1 bytes follow the array"),
        ("zip.npz", b"PK\x05\x06".to_vec(), "not a .npz (zip) archive"),
        ("bad.safetensors", [[0xff; 8], [0; 8]].concat(), "not a safetensors file"),
    ] {
        let message = error(name, &bytes);
        assert!(message.contains(name) && message.contains(want), "{name}: {message}");
    }
}
