//! [`Checkpoint`]: the named tensors of a file or folder, memory-mapped, each read when it is asked for.

use super::pickle::{self, TensorView};
use crate::LoadError;
use candle_core::{DType, Device, Error, Result, Tensor};
use memmap2::Mmap;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Named tensors on disk: safetensors in one file or several (with `….safetensors.index.json`), or what `torch.save`
/// writes (`.pt`, `.pth`, `.th`, `.ckpt`, `.bin`; also in several files, with `….bin.index.json`).
///
/// Opening maps the files and lists names and shapes; no weights are read. A pickle is read as data, never run.
/// The files must not change while they are open.
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<Mmap>,
    tensors: BTreeMap<String, Entry>,
}

/// Where a tensor lies.
#[derive(Debug, Clone)]
struct Entry {
    shape: Vec<usize>,
    /// Elements between neighbours, per axis; none where rows follow each other without gaps.
    stride: Option<Vec<usize>>,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    /// Bytes from `start` to `end` of a file; for a strided tensor they reach from its first to its last element.
    File { file: usize, start: usize, end: usize, dtype: DType },
    /// Numbers of a kind that no model here reads.
    Unreadable(String),
    /// In a checkpoint without data.
    Nowhere,
}

/// What a folder may hold, best first.
const NAMES: [&str; 6] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];
/// Endings of checkpoint files, best first.
const ENDINGS: [&str; 6] = ["safetensors", "pt", "pth", "th", "ckpt", "bin"];

impl Checkpoint {
    /// Opens a file, or the checkpoint in a folder: `model.safetensors`, `diffusion_pytorch_model.safetensors` or
    /// `pytorch_model.bin`, whole or in several files with their index, or else the only checkpoint file there.
    ///
    /// # Errors
    /// If there is none or several, a file is damaged, cut short or of another format, or a pickle calls a function
    /// that no checkpoint needs.
    pub fn open(path: impl AsRef<Path>) -> std::result::Result<Self, LoadError> {
        let path = Self::find(path)?;
        let fail = |text: String| unreadable(&path, text);
        let mut checkpoint = Self { path: path.clone(), files: vec![], tensors: BTreeMap::new() };
        if path.extension().is_some_and(|e| e == "json") {
            let folder = path.parent().unwrap_or(Path::new("."));
            for file in shards(&path).map_err(fail)? {
                checkpoint.add(&folder.join(file))?;
            }
        } else {
            checkpoint.add(&path)?;
        }
        Ok(checkpoint)
    }

    /// The file that [`Self::open`] opens: `path` itself if it is one.
    ///
    /// # Errors
    /// If there is none, or several and none has a usual name.
    pub fn find(path: impl AsRef<Path>) -> std::result::Result<PathBuf, LoadError> {
        let path = path.as_ref();
        let fail = |text: String| unreadable(path, text);
        if !path.is_dir() {
            return Ok(path.to_path_buf()); // a missing file is found missing when it is mapped
        }
        if let Some(name) = NAMES.iter().find(|name| path.join(name).is_file()) {
            return Ok(path.join(name));
        }
        let mut found = vec![];
        for entry in std::fs::read_dir(path).map_err(|e| fail(e.to_string()))? {
            let file = entry.map_err(|e| fail(e.to_string()))?.path();
            let ending = file.extension().and_then(|e| e.to_str()).unwrap_or_default().to_string();
            let rank = ENDINGS.iter().position(|e| *e == ending);
            found.extend(rank.filter(|_| file.is_file()).map(|rank| (rank, file)));
        }
        found.sort();
        let best: Vec<&PathBuf> = found.iter().filter(|f| f.0 == found[0].0).map(|f| &f.1).collect();
        match best.as_slice() {
            [one] => Ok(one.to_path_buf()),
            [] => Err(fail(format!(
                "the folder holds no checkpoint\nhint: expected {}, or one file that ends in {}",
                NAMES[0],
                ENDINGS.map(|e| format!(".{e}")).join(", ")
            ))),
            several => Err(fail(format!(
                "the folder holds several checkpoints: {}\nhint: name one of them",
                several.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ")
            ))),
        }
    }

    /// Tensors with names and shapes but without data, as a checkpoint of the shape of a published one: for checks of
    /// whether a model fits it. Tensors read from it are zeros that take no memory.
    pub fn without_data(shapes: impl IntoIterator<Item = (String, Vec<usize>)>) -> Self {
        let entry = |shape| Entry { shape, stride: None, place: Place::Nowhere };
        let tensors = shapes.into_iter().map(|(name, shape)| (name, entry(shape))).collect();
        Self { path: "list of shapes".into(), files: vec![], tensors }
    }

    fn add(&mut self, path: &Path) -> std::result::Result<(), LoadError> {
        let fail = |text: String| unreadable(path, text);
        let file = File::open(path).map_err(|e| fail(e.to_string()))?;
        if file.metadata().map_err(|e| fail(e.to_string()))?.len() == 0 {
            return Err(fail("the file is empty\nhint: download it again".into()));
        }
        // SAFETY: the map is read only; that nobody changes a checkpoint while it is read is this type's condition.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| fail(e.to_string()))?;
        let n = self.files.len();
        let tensors = match Format::of(&map).map_err(fail)? {
            Format::Safetensors => safetensors_entries(&map, n),
            Format::Torch => torch_entries(&map, n),
        };
        self.tensors.extend(tensors.map_err(fail)?);
        self.files.push(map);
        Ok(())
    }

    /// The file, or the index of several.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor; none if there is no such tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Reads a tensor, as `dtype`, onto a device.
    ///
    /// # Errors
    /// If there is no such tensor, or its numbers are of a kind that candle does not know.
    pub fn read(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.read_part(name, (0, 1), dtype, device)
    }

    /// Reads the `i`-th of `n` equal parts along the first axis of a tensor, `(i, n)`.
    pub(super) fn read_part(
        &self,
        name: &str,
        (i, n): (usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let entry = self.tensors.get(name).ok_or_else(|| Error::CannotFindTensor { path: name.into() })?;
        let mut shape = entry.shape.clone();
        if n > 1 {
            shape[0] /= n;
        }
        let (file, start, end, stored) = match &entry.place {
            Place::File { file, start, end, dtype } => (*file, *start, *end, *dtype),
            Place::Unreadable(kind) => candle_core::bail!("its numbers are of the kind {kind}"),
            Place::Nowhere => {
                return Tensor::zeros((), dtype, device)?.broadcast_as(shape);
            }
        };
        let map = &self.files[file];
        let size = stored.size_in_bytes();
        // The part's bytes; of a strided tensor, the offset of its first element, up to the end.
        let (start, end) = match &entry.stride {
            None => {
                let len = shape.iter().product::<usize>() * size;
                (start + i * len, start + (i + 1) * len)
            }
            Some(stride) if n > 1 => (start + i * shape[0] * stride[0] * size, end),
            Some(_) => (start, end),
        };
        let bytes = &map[start..end];
        let tensor = match &entry.stride {
            None => Tensor::from_raw_buffer(bytes, stored, &shape, device)?,
            Some(stride) => {
                Tensor::from_raw_buffer(&gather(bytes, size, &shape, stride), stored, &shape, device)?
            }
        };
        forget(map, start, end);
        tensor.to_dtype(dtype)
    }
}

/// Tells the system that these bytes were used once, so that a process does not count the file beside its copy.
fn forget(map: &Mmap, start: usize, end: usize) {
    #[cfg(unix)]
    // SAFETY: the map is of a file and read only: pages that are dropped come back from the file.
    // A refusal costs nothing but the memory's looks.
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
    #[cfg(not(unix))]
    let _ = (map, start, end);
}

fn unreadable(path: &Path, text: String) -> LoadError {
    LoadError::Unreadable { path: path.to_path_buf(), source: Box::new(Error::Msg(text)) }
}

/// The elements of a strided tensor in order.
fn gather(bytes: &[u8], size: usize, shape: &[usize], stride: &[usize]) -> Vec<u8> {
    let n: usize = shape.iter().product();
    let mut out = Vec::with_capacity(n * size);
    let mut index = vec![0; shape.len()];
    for _ in 0..n {
        let at: usize = index.iter().zip(stride).map(|(i, s)| i * s).sum();
        out.extend_from_slice(&bytes[at * size..(at + 1) * size]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    out
}

/// The files that an index names, each once.
fn shards(index: &Path) -> std::result::Result<Vec<String>, String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(|e| e.to_string())?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| {
        format!("it is no index of checkpoint files: {e}\nhint: name the folder or a weight file")
    })?;
    let mut files: Vec<String> = parsed.weight_map.into_values().collect();
    files.sort();
    files.dedup();
    let folder = index.parent().unwrap_or(Path::new("."));
    if let Some(name) = files.iter().find(|f| Path::new(f).file_name() != Some(f.as_ref())) {
        return Err(format!("it names the file `{name}` outside its folder"));
    }
    let missing: Vec<&str> = files.iter().map(String::as_str).filter(|f| !folder.join(f).is_file()).collect();
    match missing.as_slice() {
        [] => Ok(files),
        _ => Err(format!(
            "{} of its {} files are missing: {}\nhint: download them into the same folder",
            missing.len(),
            files.len(),
            missing.join(", ")
        )),
    }
}

/// Formats of one file.
enum Format {
    Safetensors,
    Torch,
}

/// The first bytes of a file of `torch.save` before PyTorch 1.6.
const OLD_TORCH: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";

impl Format {
    /// Told by the content: endings lie.
    fn of(bytes: &[u8]) -> std::result::Result<Self, String> {
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(64)]).trim_start().to_lowercase();
        if bytes.starts_with(b"PK") {
            return Ok(Self::Torch);
        }
        if bytes.len() > 8 && bytes[8] == b'{' {
            return Ok(Self::Safetensors);
        }
        Err(if bytes.starts_with(OLD_TORCH) {
            "it is in PyTorch's format from before version 1.6\nhint: convert it once in Python: \
             `torch.save(torch.load(path, map_location=\"cpu\"), path)`"
        } else if bytes.starts_with(b"\x80") {
            "it is a Python pickle, but not one that `torch.save` wrote\nhint: save the `state_dict` as safetensors"
        } else if text.starts_with("version https://git-lfs") {
            "it is a pointer of Git LFS, not the file itself\nhint: run `git lfs pull`, or download the file"
        } else if text.starts_with('<') {
            "it is a web page, not a checkpoint\nhint: the download saved an error message; download it again"
        } else {
            "it is neither safetensors nor a file of `torch.save`"
        }
        .into())
    }
}

fn safetensors_entries(bytes: &[u8], file: usize) -> std::result::Result<BTreeMap<String, Entry>, String> {
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("a safetensors file has more than 8 bytes"));
    let data = usize::try_from(header).ok().and_then(|n| n.checked_add(8)).filter(|n| *n <= bytes.len());
    let data = data.ok_or_else(|| cut_short(format!("its header says {header} bytes"), bytes.len()))?;
    let damaged =
        |e: &dyn std::fmt::Display| format!("it is no safetensors file: {e}\nhint: download it again");
    // The library says of a file cut short only that its sizes do not agree.
    let needed = data_end(&bytes[8..data]).map_err(|e| damaged(&e))?.saturating_add(data);
    if needed > bytes.len() {
        return Err(cut_short(format!("its header says {needed} bytes"), bytes.len()));
    }
    let (_, metadata) = safetensors::SafeTensors::read_metadata(bytes).map_err(|e| damaged(&e))?;
    let mut entries = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let (start, end) = (data + info.data_offsets.0, data + info.data_offsets.1);
        let place = match DType::try_from(info.dtype) {
            Ok(dtype) => Place::File { file, start, end, dtype },
            Err(_) => Place::Unreadable(format!("{:?}", info.dtype)),
        };
        entries.insert(name, Entry { shape: info.shape.clone(), stride: None, place });
    }
    Ok(entries)
}

/// Bytes of data after a safetensors header.
fn data_end(header: &[u8]) -> serde_json::Result<usize> {
    #[derive(serde::Deserialize)]
    struct Info {
        #[serde(default)]
        data_offsets: (usize, usize), // absent from `__metadata__`
    }
    let infos: BTreeMap<String, Info> = serde_json::from_slice(header)?;
    Ok(infos.into_values().map(|info| info.data_offsets.1).max().unwrap_or(0))
}

fn cut_short(expected: String, found: usize) -> String {
    format!("it is cut short: {expected}, found {found}\nhint: the download is incomplete; download it again")
}

fn torch_entries(bytes: &[u8], file: usize) -> std::result::Result<BTreeMap<String, Entry>, String> {
    // The list of an archive's files stands at its end.
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(bytes))
        .map_err(|e| cut_short(format!("its table of contents is missing ({e})"), bytes.len()))?;
    let mut members = BTreeMap::new();
    let mut pickle = None;
    for i in 0..archive.len() {
        let damaged =
            |e: zip::result::ZipError| format!("its member {i} is damaged: {e}\nhint: download it again");
        let member = archive.by_index_raw(i).map_err(damaged)?;
        let name = member.name().map_err(damaged)?.to_string();
        if member.compression() != zip::CompressionMethod::Stored {
            continue; // torch.save never compresses; without its data.pkl the file is refused below
        }
        let start = data_start(bytes, member.header_start(), member.size());
        let start = start.ok_or_else(|| cut_short(format!("`{name}` lies beyond its end"), bytes.len()))?;
        let range = (start, start + member.size() as usize);
        if let Some(folder) = name.strip_suffix("data.pkl") {
            pickle = Some((folder.to_string(), range));
        }
        members.insert(name, range);
    }
    let (folder, (start, end)) = pickle.ok_or(
        "it is a zip archive, but not one of `torch.save`: it has no data.pkl\nhint: unpack it, and name what is in it",
    )?;
    if members.contains_key(&format!("{folder}constants.pkl")) {
        return Err(
            "it is a TorchScript program, not a checkpoint\nhint: save its `state_dict` in Python".into()
        );
    }
    let tensors = pickle::named_tensors(&bytes[start..end])?;
    let mut entries = BTreeMap::new();
    for (name, view) in tensors {
        let storage = members.get(&format!("{folder}data/{}", view.storage)).copied();
        let entry = torch_entry(&view, file, storage).map_err(|e| format!("tensor `{name}`: {e}"))?;
        entries.insert(name, entry);
    }
    Ok(entries)
}

/// Where the data of an archive's member begins: after its local header, which has a length of its own.
fn data_start(bytes: &[u8], header: u64, size: u64) -> Option<usize> {
    let header = usize::try_from(header).ok()?;
    let local = bytes.get(header..header.checked_add(30)?)?;
    let length = |at: usize| usize::from(u16::from_le_bytes([local[at], local[at + 1]]));
    let start = header + 30 + length(26) + length(28);
    (start.checked_add(usize::try_from(size).ok()?)? <= bytes.len()).then_some(start)
}

fn torch_entry(
    view: &TensorView,
    file: usize,
    storage: Option<(usize, usize)>,
) -> std::result::Result<Entry, String> {
    let shape = view.shape.clone();
    let dtype = match view.kind.as_str() {
        "FloatStorage" => DType::F32,
        "DoubleStorage" => DType::F64,
        "HalfStorage" => DType::F16,
        "BFloat16Storage" => DType::BF16,
        "ByteStorage" | "BoolStorage" => DType::U8,
        "ShortStorage" => DType::I16,
        "IntStorage" => DType::I32,
        "LongStorage" => DType::I64,
        other => return Ok(Entry { shape, stride: None, place: Place::Unreadable(other.into()) }),
    };
    let (start, end) = storage.ok_or_else(|| format!("its data `{}` is missing", view.storage))?;
    let size = dtype.size_in_bytes();
    let n = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    let mut dense = 1;
    let mut is_dense = true;
    // Elements from the first to the last one, with that.
    let mut reach = Some(1usize);
    for (n, step) in shape.iter().zip(&view.stride).rev() {
        is_dense &= *n == 1 || *step == dense;
        dense = dense.saturating_mul(*n);
        reach = reach.and_then(|r| n.saturating_sub(1).checked_mul(*step)?.checked_add(r));
    }
    let reach = if n == Some(0) { Some(0) } else { reach };
    let bytes = |elements: usize| elements.checked_mul(size);
    let from = bytes(view.offset).and_then(|offset| start.checked_add(offset));
    let to = from.zip(reach.and_then(bytes)).and_then(|(from, len)| from.checked_add(len));
    // Strided views that repeat elements may claim any size; none of a model does.
    let fits = n.and_then(bytes).is_some_and(|len| len <= end - start) && to.is_some_and(|to| to <= end);
    match (from, to) {
        (Some(start), Some(end)) if fits => {
            let stride = (!is_dense && n != Some(0)).then(|| view.stride.clone());
            Ok(Entry { shape, stride, place: Place::File { file, start, end, dtype } })
        }
        _ => Err(format!("shape {:?} does not fit its data of {} bytes", view.shape, end - start)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write_safetensors;
    use std::fs;

    fn message(path: &Path) -> String {
        Checkpoint::open(path).err().unwrap().to_string()
    }

    fn tensors(names: &[&str]) -> BTreeMap<String, Tensor> {
        let tensor = Tensor::arange(0f32, 6f32, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        names.iter().map(|name| (name.to_string(), tensor.clone())).collect()
    }

    #[test]
    fn a_file_in_parts_reads_like_a_whole_one_in_any_dtype() {
        let dir = tempfile::tempdir().unwrap();
        for (file, name) in [("one.safetensors", "a"), ("two.safetensors", "b")] {
            write_safetensors(dir.path().join(file), &tensors(&[name]), &BTreeMap::new()).unwrap();
        }
        assert!(message(dir.path()).contains("several checkpoints"));
        let index = r#"{"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
        fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(checkpoint.shape("b"), Some(&[2, 3][..]));
        let b = checkpoint.read("b", DType::BF16, &Device::Cpu).unwrap();
        assert_eq!(b.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap(), [[0., 1., 2.], [3., 4., 5.]]);
        fs::remove_file(dir.path().join("two.safetensors")).unwrap();
        assert!(message(dir.path()).contains("1 of its 2 files are missing: two.safetensors"));
        fs::write(dir.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../x"}}"#)
            .unwrap();
        assert!(message(dir.path()).contains("outside its folder"));
    }

    #[test]
    fn what_is_no_checkpoint_says_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.pt");
        assert!(message(&path).contains("No such file"));
        assert!(message(dir.path()).contains("holds no checkpoint"));
        for (content, part) in [
            (&b""[..], "the file is empty"),
            (b"<!DOCTYPE html><html>", "a web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
            (OLD_TORCH, "before version 1.6"),
            (b"\x80\x04\x95", "Python pickle"),
            (b"GGUF1234abcdefgh", "neither safetensors nor"),
            (b"PK\x03\x04 and no more", "cut short"),
        ] {
            fs::write(&path, content).unwrap();
            let text = message(&path);
            assert!(text.contains(part) && text.contains("m.pt"), "{text}");
        }
    }

    #[test]
    fn a_download_cut_short_is_told_from_a_damaged_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        write_safetensors(&path, &tensors(&["a", "b"]), &BTreeMap::new()).unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in [12, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            let text = message(&path);
            assert!(text.contains("cut short") && text.contains(&format!("found {cut}")), "{text}");
        }
        let mut damaged = whole.clone();
        damaged[9] = b'!';
        fs::write(&path, damaged).unwrap();
        assert!(message(&path).contains("no safetensors file"));
    }

    #[test]
    fn strided_views_are_gathered_and_impossible_ones_refused() {
        let view = |shape: &[usize], stride: &[usize], offset| TensorView {
            kind: "FloatStorage".into(),
            storage: "0".into(),
            offset,
            shape: shape.into(),
            stride: stride.into(),
        };
        let entry = torch_entry(&view(&[3, 2], &[1, 3], 0), 0, Some((0, 24))).unwrap();
        assert_eq!(entry.stride, Some(vec![1, 3]));
        let bytes: Vec<u8> = (0..6u8).flat_map(|i| [i, 0, 0, 0]).collect();
        let got = gather(&bytes, 4, &[3, 2], &[1, 3]);
        assert_eq!(got.iter().step_by(4).copied().collect::<Vec<_>>(), [0, 3, 1, 4, 2, 5]);
        assert_eq!(torch_entry(&view(&[2, 1, 3], &[3, 77, 1], 0), 0, Some((0, 24))).unwrap().stride, None);
        assert!(torch_entry(&view(&[2, 3], &[3, 1], 1), 0, Some((0, 24))).is_err());
        assert!(torch_entry(&view(&[usize::MAX, 2], &[0, 0], 0), 0, Some((0, 24))).is_err());
        assert!(torch_entry(&view(&[1000], &[0], 0), 0, Some((0, 24))).is_err());
    }
}
