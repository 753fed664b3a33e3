//! Pages of an Ogg file (RFC 3533): symphonia leaves out damaged and missing ones without a word, which loses audio.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use symphonia::core::checksum::Crc32;
use symphonia::core::io::Monitor;

use crate::error::{Error, Result};

/// Bytes of a page before its lacing values.
const HEADER: usize = 27;

/// Checks that every page up to the end of the stream is there and as it was written, and that the stream ends.
///
/// # Errors
/// If a page is damaged or missing, or the file ends before the page with the end-of-stream flag does.
pub(crate) fn check_pages(path: &Path, file: &mut File) -> Result<()> {
    let io = |e| Error::io(path, "read", e);
    let truncated = |found: String| Error::Truncated {
        path: path.to_path_buf(),
        expected: "a last Ogg page with the end-of-stream flag".to_string(),
        found,
    };
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    let mut reader = BufReader::new(file);
    let mut page = Vec::new();
    let mut stream: Option<Stream> = None;
    loop {
        page.clear();
        let mut more = |page: &mut Vec<u8>, n: usize| {
            let found = reader.by_ref().take(n as u64).read_to_end(page).map_err(io)?;
            Ok::<bool, Error>(found == n)
        };
        let is_whole = more(&mut page, HEADER)?;
        let damaged = |detail: String| Error::Damaged {
            path: path.to_path_buf(),
            at_s: stream.as_ref().map_or(0.0, Stream::end_s),
            detail,
        };
        if !is_whole && b"OggS".starts_with(&page[..page.len().min(4)]) {
            return Err(truncated(match page.len() {
                0 => "a page in the middle of the stream".into(),
                _ => "half a page header".into(),
            }));
        }
        if !page.starts_with(b"OggS\0") {
            return Err(damaged("bytes that are no Ogg page".into()));
        }
        let n_lacing = usize::from(page[26]);
        if !more(&mut page, n_lacing)? {
            return Err(truncated("half a page header".into()));
        }
        let n_body: usize = page[HEADER..].iter().map(|&n| usize::from(n)).sum();
        let n_page = page.len() + n_body;
        if !more(&mut page, n_body)? {
            return Err(truncated(format!("{} of the last page's {n_page} bytes", page.len())));
        }
        if !checksum_agrees(&mut page) {
            return Err(damaged("a page's checksum does not agree with it".into()));
        }
        let serial = number(&page, 14);
        let known = stream.get_or_insert_with(|| Stream::new(&page, n_page - n_body));
        if serial != known.serial {
            continue; // of another stream in the same file
        }
        if number(&page, 18) != known.n_pages {
            let missing =
                format!("page {} is followed by page {}", known.n_pages.wrapping_sub(1), number(&page, 18));
            return Err(Error::Damaged { path: path.to_path_buf(), at_s: known.end_s(), detail: missing });
        }
        known.n_pages = known.n_pages.wrapping_add(1);
        let granule = i64::from_le_bytes(page[6..14].try_into().expect("eight bytes"));
        if granule >= 0 {
            known.granule = granule; // -1 where no packet ends
        }
        if page[5] & 0x04 != 0 {
            return Ok(());
        }
    }
}

/// The first stream of a file, up to where it was read.
struct Stream {
    serial: u32,
    n_pages: u32,
    /// Samples at the end of the last page.
    granule: i64,
    rate_hz: Option<u32>,
}

impl Stream {
    /// Of the first page, whose body starts at `body`.
    fn new(page: &[u8], body: usize) -> Self {
        let head = &page[body..];
        let rate_hz = match head {
            _ if head.starts_with(b"OpusHead") => Some(48_000),
            _ if head.starts_with(b"\x01vorbis") && head.len() >= 16 => Some(number(head, 12)),
            _ => None,
        };
        Self { serial: number(page, 14), n_pages: number(page, 18), granule: 0, rate_hz }
    }

    /// Where the last page ends, s; 0 where the rate is unknown.
    fn end_s(&self) -> f64 {
        match self.rate_hz {
            Some(rate_hz @ 1..) => self.granule as f64 / f64::from(rate_hz),
            _ => 0.0,
        }
    }
}

/// Whether a page's checksum is that of its bytes, its own four taken as zeros, which they are afterwards.
fn checksum_agrees(page: &mut [u8]) -> bool {
    let stated = number(page, 22);
    page[22..26].fill(0);
    let mut crc = Crc32::new(0);
    crc.process_buf_bytes(page);
    crc.crc() == stated
}

/// The little-endian number at `at`.
fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}
