//! Keeps the keys of session tickets for the agent's successor, in memory only.
//!
//! One file: a line for each generation of keys, and a line for each ticket that was used, appended
//! before the ticket is honoured. So a successor, also one after a crash, honours no ticket a second
//! time. A file that cannot be read whole is not used at all: its keys are worth a handshake each.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use zeroize::{Zeroize, Zeroizing};

use super::{in_memory, replace};
use crate::text::hex;
use crate::tls::ticket::{Generation, Journal, LIFETIME_SECONDS, Name, Serial, TicketKeys, fleeting};

/// The form of the file: a successor of another form begins anew.
const FIRST_LINE: &str = "hauberk tickets 1";

/// The keys to seal tickets with: a predecessor's, as long as they last. In a directory that is not
/// in memory nothing is kept.
pub fn take_up(dir: &Path, now: SystemTime) -> Arc<TicketKeys> {
    if !in_memory(dir) {
        tracing::warn!(dir = %dir.display(), "the runtime directory is not on a tmpfs: the keys of session tickets are not kept, so a restarted agent's peers make full handshakes");
        return fleeting();
    }
    let path = dir.join("tickets");
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let kept = read(&path).unwrap_or_else(|why| {
        if why.kind() != io::ErrorKind::NotFound {
            tracing::warn!(path = %path.display(), error = %why, "cannot take up the keys of session tickets: peers make full handshakes");
        }
        Vec::new()
    });
    let young: Vec<_> =
        kept.into_iter().filter(|g| now.saturating_sub(g.born) < 2 * LIFETIME_SECONDS).collect();
    let journal = Kept { path, file: Mutex::new(None) };
    // Writes at once what holds from now on, so that there is a file to append to.
    match journal.rotated(&young) {
        Ok(()) => {
            if !young.is_empty() {
                tracing::info!(
                    generations = young.len(),
                    "took up the keys of session tickets from before the restart"
                );
            }
            Arc::new(TicketKeys::restore(young, Box::new(journal)))
        }
        Err(error) => {
            tracing::warn!(%error, "cannot keep the keys of session tickets: a restarted agent's peers make full handshakes");
            Arc::new(TicketKeys::new(Box::new(journal)))
        }
    }
}

#[derive(Debug)]
struct Kept {
    path: PathBuf,
    /// Where used tickets are appended; `None` when there is no file for a successor to read.
    file: Mutex<Option<File>>,
}

impl Journal for Kept {
    fn rotated(&self, generations: &[Generation]) -> io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        *file = None;
        let text = write(generations);
        match replace(&self.path, text.as_bytes()) {
            Ok(open) => {
                *file = Some(open);
                Ok(())
            }
            Err(error) => {
                // Old keys without their used tickets must not be found.
                match fs::remove_file(&self.path) {
                    Err(gone) if gone.kind() != io::ErrorKind::NotFound => Err(gone),
                    _ => Err(error),
                }
            }
        }
    }

    fn spent(&self, generation: &Name, serial: &Serial) -> io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        match file.as_mut() {
            Some(file) => file.write_all(spent_line(generation, serial).as_bytes()),
            // If there is a file all the same, it is one that could not be removed.
            None if self.path.exists() => Err(io::ErrorKind::AlreadyExists.into()),
            None => Ok(()),
        }
    }
}

fn write(generations: &[Generation]) -> Zeroizing<String> {
    let lines: usize = generations.iter().map(|g| 2 + g.spent.len()).sum();
    // Enough that it never moves: a moved key would leave its bytes behind.
    let mut text = Zeroizing::new(String::with_capacity(128 * (lines + 1)));
    text.push_str(FIRST_LINE);
    text.push('\n');
    for generation in generations {
        let secret = Zeroizing::new(hex(generation.secret.as_ref()));
        // Writing into a String does not fail.
        let _ = writeln!(text, "key {} {} {}", hex(&generation.name), generation.born, *secret);
        for serial in &generation.spent {
            text.push_str(&spent_line(&generation.name, serial));
        }
    }
    text
}

fn spent_line(generation: &Name, serial: &Serial) -> String {
    format!("used {} {}\n", hex(generation), hex(serial))
}

fn read(path: &Path) -> io::Result<Vec<Generation>> {
    let text = Zeroizing::new(fs::read_to_string(path)?);
    parse(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a whole file of this version"))
}

fn parse(text: &str) -> Option<Vec<Generation>> {
    let mut lines = text.strip_suffix('\n')?.split('\n');
    if lines.next()? != FIRST_LINE {
        return None;
    }
    let mut generations: Vec<Generation> = Vec::new();
    for line in lines {
        let fields: Vec<&str> = line.split(' ').collect();
        match *fields.as_slice() {
            ["key", name, born, secret] => {
                let mut bytes = unhex::<32>(secret)?;
                let secret = Zeroizing::new(bytes);
                bytes.zeroize();
                let (name, born) = (unhex(name)?, born.parse().ok()?);
                generations.push(Generation { name, secret, born, spent: HashSet::new() });
            }
            ["used", name, serial] => {
                let name: Name = unhex(name)?;
                generations.iter_mut().find(|g| g.name == name)?.spent.insert(unhex(serial)?);
            }
            _ => return None,
        }
    }
    Some(generations)
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut bytes = [0; N];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use rustls::pki_types::UnixTime;

    use super::*;
    use crate::tls::ticket::Binding;
    use crate::verdict::Unresumed;

    struct Dir(PathBuf);

    impl Dir {
        fn new() -> Self {
            Self(Path::new("/dev/shm").join(format!("hauberk-tickets-{:x}", fastrand::u64(..))))
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn binding() -> Binding {
        Binding::new(&[b"trust"], &[b"place"], &[b"terms"])
    }

    #[test]
    fn a_successor_opens_what_was_sealed_and_knows_what_was_used() {
        let dir = Dir::new();
        let (now, later) = (SystemTime::now(), SystemTime::now() + Duration::from_secs(30));
        let first = take_up(&dir.0, now);
        let used = first.seal(&binding(), b"used".to_vec(), UnixTime::now()).unwrap();
        let kept = first.seal(&binding(), b"kept".to_vec(), UnixTime::now()).unwrap();
        first.spend(&first.open(&binding(), &used, UnixTime::now()).unwrap()).unwrap();
        let mode = fs::metadata(dir.0.join("tickets")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "only the agent may read the keys");
        // No word of goodbye: as after a crash.
        let second = take_up(&dir.0, later);
        let opened = second.open(&binding(), &kept, UnixTime::now()).unwrap();
        assert_eq!(opened.plain, b"kept");
        assert_eq!(second.spend(&opened), Ok(()));
        let again = second.open(&binding(), &used, UnixTime::now()).unwrap();
        assert_eq!(second.spend(&again), Err(Unresumed::Reused), "used before the restart");
        let third = take_up(&dir.0, later);
        let twice = third.open(&binding(), &kept, UnixTime::now()).unwrap();
        assert_eq!(third.spend(&twice), Err(Unresumed::Reused), "used by the successor");
    }

    #[test]
    fn keys_too_old_or_in_a_broken_file_are_not_taken_up() {
        let dir = Dir::new();
        let now = SystemTime::now();
        let first = take_up(&dir.0, now);
        let ticket = first.seal(&binding(), Vec::new(), UnixTime::now()).unwrap();
        let path = dir.0.join("tickets");
        let whole = fs::read_to_string(&path).unwrap();
        let opens = |at| take_up(&dir.0, at).open(&binding(), &ticket, UnixTime::now()).is_ok();
        assert!(opens(now), "the file as it was written");
        fs::write(&path, &whole).unwrap();
        assert!(!opens(now + Duration::from_secs(2 * LIFETIME_SECONDS + 1)), "too old");
        for broken in [&whole[..whole.len() - 1], &whole[..whole.len() - 9], "", "something else\n"] {
            fs::write(&path, broken).unwrap();
            assert!(!opens(now), "{broken:?}");
        }
        fs::write(&path, format!("{whole}used 00 11\n")).unwrap();
        assert!(!opens(now), "a line that cannot be read may be a used ticket");
    }

    #[test]
    fn nothing_is_written_where_it_could_reach_a_disk() {
        let dir = std::env::temp_dir().join(format!("hauberk-tickets-{:x}", fastrand::u64(..)));
        if in_memory(&dir) {
            // Here even the directory for temporary files is in memory: the claim has no case.
            return fs::remove_dir_all(&dir).unwrap();
        }
        let keys = take_up(&dir, SystemTime::now());
        assert!(keys.seal(&binding(), Vec::new(), UnixTime::now()).is_some(), "it works without");
        let left: Vec<_> = fs::read_dir(&dir).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        fs::remove_dir_all(&dir).unwrap();
    }
}
