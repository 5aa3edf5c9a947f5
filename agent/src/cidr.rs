//! A range of addresses, such as `10.1.0.0/16`. An IPv4-mapped IPv6 range is the IPv4 range it maps.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// Why a text is not a range of addresses.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
pub enum CidrError {
    /// Not `address/prefix`.
    #[error("a range of addresses is written address/prefix, such as 10.1.0.0/16")]
    Form,
    /// A prefix longer than the address.
    #[error("the prefix is longer than the address")]
    Prefix,
    /// Bits behind the prefix: it is not clear which range is meant.
    #[error("the address has bits behind the prefix; write {0}")]
    HostBits(String),
}

/// A range of addresses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    first: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// Parses `address/prefix`.
    ///
    /// # Errors
    /// When it is not that, or ambiguous.
    pub fn parse(text: &str) -> Result<Self, CidrError> {
        let (address, prefix) = text.split_once('/').ok_or(CidrError::Form)?;
        let address: IpAddr = address.parse().map_err(|_| CidrError::Form)?;
        if prefix.is_empty() || !prefix.bytes().all(|b| b.is_ascii_digit()) {
            return Err(CidrError::Form);
        }
        let prefix: u8 = prefix.parse().map_err(|_| CidrError::Prefix)?;
        if prefix > width(address) {
            return Err(CidrError::Prefix);
        }
        let first = masked(address, prefix);
        if first != address {
            return Err(CidrError::HostBits(format!("{first}/{prefix}")));
        }
        Ok(match first.to_canonical() {
            v4 @ IpAddr::V4(_) if first.is_ipv6() && prefix >= 96 => Self { first: v4, prefix: prefix - 96 },
            _ => Self { first, prefix },
        })
    }

    /// Its first address.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// How many bits of the address count.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether an address is in the range; a mapped one counts as the address it maps.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.first.is_ipv4() && masked(address, self.prefix) == self.first
    }
}

/// Bits of an address.
fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The address with the bits behind the prefix cleared.
fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V4((v4.to_bits() & mask).into())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & mask))
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.prefix)
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Cidr {
    type Error = CidrError;
    fn try_from(text: String) -> Result<Self, CidrError> {
        Self::parse(&text)
    }
}

impl std::str::FromStr for Cidr {
    type Err = CidrError;
    fn from_str(text: &str) -> Result<Self, CidrError> {
        Self::parse(text)
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_holds_its_addresses_and_no_others() {
        for (range, inside, outside) in [
            ("10.1.0.0/16", "10.1.255.255", "10.2.0.0"),
            ("10.1.0.0/16", "::ffff:10.1.2.3", "fd00::1"),
            ("::ffff:10.1.0.0/112", "10.1.0.9", "10.2.0.9"),
            ("10.1.2.3/32", "10.1.2.3", "10.1.2.2"),
            ("0.0.0.0/0", "255.1.2.3", "fd00::1"),
            ("::/0", "fd00::1", "10.0.0.1"),
            ("fd00:1::/32", "fd00:1:ffff::1", "fd00:2::1"),
            ("fd00::1/128", "fd00::1", "fd00::"),
        ] {
            let cidr = Cidr::parse(range).expect(range);
            assert!(cidr.contains(inside.parse().unwrap()), "{inside} in {range}");
            assert!(!cidr.contains(outside.parse().unwrap()), "{outside} not in {range}");
        }
    }

    #[test]
    fn what_is_no_range_is_an_error_that_says_what_to_write() {
        for (text, error) in [
            ("10.0.0.0", CidrError::Form),
            ("10.0.0/8", CidrError::Form),
            ("10.0.0.0/+8", CidrError::Form),
            ("10.0.0.0/", CidrError::Form),
            ("10.0.0.0/33", CidrError::Prefix),
            ("10.0.0.0/999", CidrError::Prefix),
            ("::/129", CidrError::Prefix),
            ("10.1.2.3/8", CidrError::HostBits("10.0.0.0/8".into())),
            ("fd00::1/64", CidrError::HostBits("fd00::/64".into())),
        ] {
            assert_eq!(Cidr::parse(text), Err(error), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_parses_prints_back(bits: u128, prefix in 0u8..=128, four: bool) {
            let (address, prefix) = match four {
                true => (IpAddr::V4((bits as u32).into()), prefix.min(32)),
                false => (IpAddr::V6(bits.into()), prefix),
            };
            let cidr = Cidr::parse(&format!("{}/{prefix}", masked(address, prefix))).unwrap();
            proptest::prop_assert_eq!(Cidr::parse(&cidr.to_string()), Ok(cidr));
            proptest::prop_assert!(cidr.contains(address));
        }

        #[test]
        fn no_text_makes_it_panic(text in "[0-9a-f.:/]{0,40}") {
            let _ = Cidr::parse(&text);
        }
    }
}
