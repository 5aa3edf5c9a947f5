//! Packages that this machine's own sources do not offer: fetched by apt with lists of our own, so that
//! its signatures are checked and the machine's configuration stays as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::shell::{self, command};

/// A suite of Debian's archive, with apt's lists of it in a directory of ours.
pub(crate) struct Suite {
    dir: PathBuf,
}

impl Suite {
    /// Reads the lists of a suite; `kind` is `deb` or `deb-src`.
    pub(crate) fn read(dir: &Path, kind: &str, suite: &str) -> Result<Self> {
        let suite_of = Self { dir: dir.to_owned() };
        fs::create_dir_all(dir.join("sources"))?;
        fs::create_dir_all(dir.join("lists/partial"))?;
        let text = format!(
            "Types: {kind}\nURIs: {}\nSuites: {suite}\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
            mirror()?
        );
        fs::write(dir.join("sources/suite.sources"), text)?;
        shell::run(suite_of.apt(&["update"]))?;
        Ok(suite_of)
    }

    /// `apt-get` on this suite alone, working in its directory.
    pub(crate) fn apt(&self, args: &[&str]) -> Command {
        let options = [
            "-o".to_owned(),
            "Dir::Etc::sourcelist=/dev/null".to_owned(),
            "-o".to_owned(),
            format!("Dir::Etc::sourceparts={}", self.dir.join("sources").display()),
            "-o".to_owned(),
            format!("Dir::State::lists={}", self.dir.join("lists").display()),
            "-q".to_owned(),
        ];
        let args: Vec<String> = options.into_iter().chain(args.iter().map(|arg| (*arg).to_owned())).collect();
        let mut apt = command("apt-get", &args);
        apt.current_dir(&self.dir);
        apt
    }
}

/// The Debian mirror that this machine's own apt uses.
pub(crate) fn mirror() -> Result<String> {
    let mut texts = vec![fs::read_to_string("/etc/apt/sources.list").unwrap_or_default()];
    if let Ok(parts) = fs::read_dir("/etc/apt/sources.list.d") {
        texts.extend(parts.flatten().filter_map(|part| fs::read_to_string(part.path()).ok()));
    }
    texts.iter().find_map(|text| mirror_in(text)).context("apt's sources name no Debian mirror")
}

/// Both formats of sources.list(5): `URIs:` fields and `deb [options] URI suite ...` lines.
fn mirror_in(text: &str) -> Option<String> {
    let uris = text.lines().flat_map(|line| {
        let line = line.split('#').next().unwrap_or_default().trim();
        let words = match line.strip_prefix("URIs:") {
            Some(uris) => uris,
            None if line.starts_with("deb ") => line,
            None => "",
        };
        words.split_whitespace().filter(|word| word.contains("://"))
    });
    let is_debian = |uri: &&str| uri.trim_end_matches('/').ends_with("/debian");
    uris.filter(is_debian).map(str::to_owned).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_found_in_both_formats() {
        let deb822 = "Types: deb\n# http://snapshot.example/debian/2025\nURIs: http://mirror.example/debian\nSuites: x\n";
        assert_eq!(mirror_in(deb822).as_deref(), Some("http://mirror.example/debian"));
        let line = "deb https://other.example/cloud x main\ndeb [signed-by=/k] https://m.example/debian/ bookworm main";
        assert_eq!(mirror_in(line).as_deref(), Some("https://m.example/debian/"));
        assert_eq!(mirror_in("deb http://m.example/debian-security x main"), None);
    }
}
