//! The `.npy` format of NumPy: one array with a header that is a Python literal.

use std::io::Read;

use half::f16;

/// Longest `.npy` header read; real ones have 128 bytes.
const NPY_HEADER_MAX: usize = 64 << 10;

/// Type of the values in a file that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Half precision, as fadtk and kadtk store embeddings: 3 digits, at most 65504.
    F16,
    /// Single precision, what encoders give.
    F32,
    /// Double precision: nothing is lost.
    #[default]
    F64,
}

impl Precision {
    /// Size of a value.
    pub(super) fn bytes(self) -> usize {
        match self {
            Precision::F16 => 2,
            Precision::F32 => 4,
            Precision::F64 => 8,
        }
    }

    /// The value that a reader will see.
    pub(super) fn round(self, x: f64) -> f64 {
        match self {
            Precision::F16 => f16::from_f64(x).to_f64(),
            Precision::F32 => f64::from(x as f32),
            Precision::F64 => x,
        }
    }

    /// Little-endian bytes of the values.
    pub(super) fn encode(self, data: &[f64]) -> Vec<u8> {
        match self {
            Precision::F16 => data.iter().flat_map(|x| f16::from_f64(*x).to_le_bytes()).collect(),
            Precision::F32 => data.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect(),
            Precision::F64 => data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }
}

/// An array of numbers of any shape, promoted to f64.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Lengths of the axes; empty for a single number.
    pub shape: Vec<usize>,
    /// The values in C order.
    pub data: Vec<f64>,
}

/// Parses the bytes of a `.npy` file (versions 1 to 3; f16, f32, f64 and integers; either byte order; C or Fortran order).
///
/// # Errors
/// A sentence saying what is wrong. Never panics, and never sets aside more memory than a small multiple of the input.
pub fn parse_npy(bytes: &[u8]) -> std::result::Result<Array, String> {
    let mut reader = bytes;
    let array = npy_from(&mut reader, bytes.len() as u64)?;
    if !reader.is_empty() {
        return Err(format!("{} bytes follow the array", reader.len()));
    }
    Ok(array)
}

/// Reads one array from the start of `reader`, which says that it holds `available` bytes.
pub(super) fn npy_from(reader: &mut dyn Read, available: u64) -> std::result::Result<Array, String> {
    let mut start = [0u8; 8];
    reader
        .read_exact(&mut start)
        .map_err(|_| "not a .npy array: shorter than its magic number".to_string())?;
    if &start[..6] != b"\x93NUMPY" {
        return Err("not a .npy array: wrong magic number".into());
    }
    let length_bytes = match start[6] {
        1 => 2,
        2 | 3 => 4,
        v => return Err(format!("version {v} of the .npy format, expected 1 to 3")),
    };
    let mut length = [0u8; 4];
    reader.read_exact(&mut length[..length_bytes]).map_err(|_| "header cut short".to_string())?;
    let length = u32::from_le_bytes(length) as usize;
    if length > NPY_HEADER_MAX {
        return Err(format!("header of {length} bytes, expected at most {NPY_HEADER_MAX}"));
    }
    let mut header = vec![0u8; length];
    reader.read_exact(&mut header).map_err(|_| "header cut short".to_string())?;
    let header = std::str::from_utf8(&header).map_err(|_| "header is not text".to_string())?;
    let header = Header::parse(header)?;
    let (swap, code) = match header.descr.as_bytes() {
        [b'<' | b'|' | b'=', rest @ ..] => (false, rest),
        [b'>', rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    let width = match code {
        b"f2" => 2,
        b"f4" | b"i4" => 4,
        b"f8" | b"i8" => 8,
        _ => return Err(format!("element type `{}`, expected f2, f4 or f8", header.descr)),
    };
    let count = header
        .shape
        .iter()
        .try_fold(1usize, |n, d| n.checked_mul(*d))
        .filter(|n| n.checked_mul(8).is_some_and(|b| b <= isize::MAX as usize))
        .ok_or_else(|| format!("shape {:?} has more elements than memory can address", header.shape))?;
    let bytes = (count * width) as u64;
    let cut_short = |found: u64| {
        let Header { shape, descr, .. } = &header;
        format!("shape {shape:?} of {descr} needs {bytes} bytes, found {found}; was the file cut short?")
    };
    let left = available.saturating_sub((8 + length_bytes + length) as u64);
    if bytes > left {
        return Err(cut_short(left));
    }
    // `take` and growth on demand: where `available` is wrong too, what is set aside follows what is there.
    let mut raw = Vec::new();
    reader.take(bytes).read_to_end(&mut raw).map_err(|e| format!("cannot read the values: {e}"))?;
    if raw.len() as u64 != bytes {
        return Err(cut_short(raw.len() as u64));
    }
    if swap {
        raw.chunks_exact_mut(width).for_each(<[u8]>::reverse);
    }
    let mut data = match code {
        b"f2" => decode::<2>(&raw, |b| f16::from_le_bytes(b).into()),
        b"f4" => decode::<4>(&raw, |b| f32::from_le_bytes(b).into()),
        b"i4" => decode::<4>(&raw, |b| i32::from_le_bytes(b).into()),
        b"i8" => decode::<8>(&raw, |b| i64::from_le_bytes(b) as f64),
        _ => decode::<8>(&raw, f64::from_le_bytes),
    };
    if header.fortran_order && header.shape.len() > 1 {
        if header.shape.len() != 2 {
            return Err(format!("Fortran order with shape {:?}, expected at most 2 axes", header.shape));
        }
        let (n, m) = (header.shape[0], header.shape[1]);
        data = (0..count).map(|k| data[k % m * n + k / m]).collect();
    }
    Ok(Array { shape: header.shape, data })
}

/// The three entries of a `.npy` header, a Python dictionary literal.
struct Header {
    descr: String,
    fortran_order: bool,
    shape: Vec<usize>,
}

impl Header {
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let bad =
            |what: &str| format!("header `{}`: {what}", text.trim().chars().take(120).collect::<String>());
        let mut rest = text.trim();
        rest = rest.strip_prefix('{').ok_or_else(|| bad("expected `{`"))?.trim_start();
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        while !rest.starts_with('}') {
            let (key, after) = quoted(rest).ok_or_else(|| bad("expected a quoted key"))?;
            rest = after.trim_start().strip_prefix(':').ok_or_else(|| bad("expected `:`"))?.trim_start();
            match key {
                "descr" => {
                    let (value, after) = quoted(rest).ok_or_else(|| bad("`descr` is not a plain type"))?;
                    descr = Some(value.to_string());
                    rest = after;
                }
                "fortran_order" => {
                    let (value, after) = if let Some(after) = rest.strip_prefix("True") {
                        (true, after)
                    } else if let Some(after) = rest.strip_prefix("False") {
                        (false, after)
                    } else {
                        return Err(bad("`fortran_order` is neither True nor False"));
                    };
                    fortran_order = Some(value);
                    rest = after;
                }
                "shape" => {
                    let inner = rest.strip_prefix('(').ok_or_else(|| bad("`shape` is not a tuple"))?;
                    let (inside, after) = inner.split_once(')').ok_or_else(|| bad("`shape` does not end"))?;
                    let mut axes = Vec::new();
                    for axis in inside.split(',').map(str::trim).filter(|a| !a.is_empty()) {
                        axes.push(axis.parse().map_err(|_| bad("`shape` holds something else than counts"))?);
                    }
                    if axes.len() > 32 {
                        return Err(bad("more than 32 axes"));
                    }
                    shape = Some(axes);
                    rest = after;
                }
                _ => return Err(bad("unknown key")),
            }
            rest = rest.trim_start();
            rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
        }
        Ok(Self {
            descr: descr.ok_or_else(|| bad("no `descr`"))?,
            fortran_order: fortran_order.ok_or_else(|| bad("no `fortran_order`"))?,
            shape: shape.ok_or_else(|| bad("no `shape`"))?,
        })
    }
}

fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    text[1..].split_once(quote)
}

/// An array as the bytes of a `.npy` file, its values rounded to `precision`.
pub(super) fn npy_bytes(array: &Array, precision: Precision) -> Vec<u8> {
    let axes: String = array.shape.iter().map(|d| format!("{d}, ")).collect();
    let axes = if array.shape.len() == 1 { axes.trim_end() } else { axes.trim_end_matches(", ") };
    let descr = format!("<f{}", precision.bytes());
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({axes}), }}");
    // Magic, version and length take 10 bytes; numpy pads to a multiple of 64 and ends in a newline.
    let padding = (64 - (10 + header.len() + 1) % 64) % 64;
    header.extend(std::iter::repeat_n(' ', padding));
    header.push('\n');
    let mut out = Vec::with_capacity(10 + header.len() + precision.bytes() * array.data.len());
    out.extend_from_slice(b"\x93NUMPY\x01\x00");
    out.extend_from_slice(&(header.len() as u16).to_le_bytes());
    out.extend_from_slice(header.as_bytes());
    out.extend(precision.encode(&array.data));
    out
}

/// Little-endian values of `W` bytes each.
pub(super) fn decode<const W: usize>(raw: &[u8], value: impl Fn([u8; W]) -> f64) -> Vec<f64> {
    raw.chunks_exact(W).map(|c| value(c.try_into().expect("chunks_exact gives W bytes"))).collect()
}
