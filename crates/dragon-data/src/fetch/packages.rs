//! Downloading and unpacking of packages, without installing them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, Result};
use crate::rng::sha256_hex;

/// An unpacked package.
pub(super) struct Unpacked {
    pub folder: PathBuf,
    pub version: String,
    pub sha256: String,
}

/// Downloads and unpacks a Debian package in `cache`, each unless done already.
pub(super) fn unpack(cache: &Path, name: &str) -> Result<Unpacked> {
    const HINT: &str = "Debian's apt-get, dpkg-deb and tar are needed (run `apt-get update` once); \
        or place the package's .deb file in the cache yourself";
    fs::create_dir_all(cache).map_err(Error::io(cache, "created"))?;
    let deb = match find(cache, &format!("{name}_"), ".deb")? {
        Some(deb) => deb,
        None => {
            tracing::info!("downloading {name}");
            run(Command::new("apt-get").args(["download", "--quiet", name]).current_dir(cache), HINT)?;
            find(cache, &format!("{name}_"), ".deb")?.ok_or_else(|| Error::Missing {
                what: "package",
                path: cache.join(name),
                hint: HINT,
            })?
        }
    };
    let bytes = fs::read(&deb).map_err(Error::io(&deb, "read"))?;
    let sha256 = sha256_hex(&bytes);
    drop(bytes);
    let file_name = deb.file_name().unwrap_or_default().to_string_lossy().to_string();
    let version = file_name.split('_').nth(1).unwrap_or("").replace("%3a", ":");
    let folder = cache.join(format!("{name}-{}", &sha256[..12]));
    if !folder.exists() {
        let partial = cache.join(format!("{name}-{}.tmp", &sha256[..12]));
        let _ = fs::remove_dir_all(&partial); // left by an interrupted run; an absent one is as good
        fs::create_dir_all(&partial).map_err(Error::io(&partial, "created"))?;
        let failed =
            |command: &str, detail: String| Error::Program { command: command.into(), detail, hint: HINT };
        let mut dpkg = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(&deb)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| failed("dpkg-deb", e.to_string()))?;
        let stream = dpkg.stdout.take().expect("its output is piped");
        run(Command::new("tar").arg("-x").arg("-C").arg(&partial).stdin(stream), HINT)?;
        let status = dpkg.wait().map_err(|e| failed("dpkg-deb", e.to_string()))?;
        if !status.success() {
            return Err(failed(
                "dpkg-deb --fsys-tarfile",
                format!("{status}; is `{}` whole?", deb.display()),
            ));
        }
        fs::rename(&partial, &folder).map_err(Error::io(&folder, "written"))?;
    }
    Ok(Unpacked { folder, version, sha256 })
}

/// Runs a program to its end.
pub(super) fn run(command: &mut Command, hint: &'static str) -> Result<()> {
    let name = format!("{command:?}").replace('"', "");
    let output = command.stdout(Stdio::null()).output().map_err(|e| Error::Program {
        command: name.clone(),
        detail: e.to_string(),
        hint,
    })?;
    if output.status.success() {
        return Ok(());
    }
    let messages = String::from_utf8_lossy(&output.stderr);
    let last = messages.lines().last().unwrap_or("no message");
    Err(Error::Program { command: name, detail: format!("{}: {last}", output.status), hint })
}

/// The file in `folder` with this beginning and end; the last by name if there are several.
pub(super) fn find(folder: &Path, prefix: &str, suffix: &str) -> Result<Option<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .map_err(Error::io(folder, "read"))?
        .filter_map(|item| item.ok())
        .filter(|item| {
            let name = item.file_name();
            let name = name.to_string_lossy();
            name.starts_with(prefix) && name.ends_with(suffix)
        })
        .map(|item| item.path())
        .collect();
    found.sort();
    Ok(found.pop())
}

/// All files below a folder; links are not followed.
pub(super) fn walk(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(&folder).map_err(Error::io(&folder, "read"))? {
            let item = item.map_err(Error::io(&folder, "read"))?;
            let kind = item.file_type().map_err(Error::io(&folder, "read"))?;
            if kind.is_dir() {
                folders.push(item.path());
            } else if kind.is_file() {
                files.push(item.path());
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_package_is_named_and_leaves_nothing_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("some-music_1.0_all.deb"), b"not a package").unwrap();
        let error = unpack(dir.path(), "some-music").err().expect("no package");
        assert!(matches!(error, Error::Program { .. }), "{error}");
        let names: Vec<_> = walk(dir.path()).unwrap();
        assert_eq!(names.len(), 1, "{names:?}");
    }
}
