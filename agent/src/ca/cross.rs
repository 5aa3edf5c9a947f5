//! Cross-certificates: a root's certificate by what signed before it, so that whoever knows only the root of that
//! finds the way to the new one.
//!
//! It is the new root's name and key under another signature. Where the key that signed before is an intermediate's,
//! those above it go along, and its path length must leave room. What is made is verified as an agent would do it that
//! was away.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, DnValue, IsCa, KeyIdMethod,
    KeyUsagePurpose, SubjectPublicKeyInfo,
};
use rustls::pki_types::CertificateDer;
use x509_parser::asn1_rs::Tag;
use x509_parser::prelude::{FromDer, ParsedExtension, X509Certificate, X509Name};
use x509_parser::x509::AttributeTypeAndValue;

use super::issuer::leads_to;
use super::{BACKDATED, Ca, CaError, serial};
use crate::identity::svid::pem;

/// What is signed to try the way lives so long.
const PROBE: Duration = Duration::from_secs(60);

/// The root of `next` by `before`, and what leads from there to the root of `before` (PEM).
///
/// # Errors
/// When it cannot be made, or nobody would believe it.
pub fn certify(next: &Ca, before: &Ca, now: SystemTime) -> Result<String, CaError> {
    let root = next.bundle().roots().first().ok_or_else(|| material("there is no root"))?;
    let cross = sign(root, before, now)?;
    let way: Vec<_> = [cross].into_iter().chain(before.above.iter().cloned()).collect();
    leads_to(before.bundle(), next, &way, PROBE, now).map_err(|e| CaError::Material(e.to_string()))?;
    Ok(way.iter().map(|certificate| pem("CERTIFICATE", certificate)).collect())
}

fn sign(root: &CertificateDer<'_>, before: &Ca, now: SystemTime) -> Result<CertificateDer<'static>, CaError> {
    let (_, parsed) = X509Certificate::from_der(root).map_err(material)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = name(parsed.subject())?;
    // Later roots stand below this one where it is not trusted itself.
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    if let Some(id) = key_id(&parsed) {
        params.key_identifier_method = KeyIdMethod::PreSpecified(id);
    }
    params.not_before = (now - BACKDATED).into();
    params.not_after = super::ends(root)?.min(before.not_after).into();
    params.serial_number = Some(serial()?);
    let key = SubjectPublicKeyInfo::from_der(parsed.public_key().raw).map_err(material)?;
    let cross = params.signed_by(&key, &before.issuer).map_err(material)?.der().clone();
    // Names are compared byte by byte.
    let (_, made) = X509Certificate::from_der(&cross).map_err(material)?;
    if made.subject().as_raw() != parsed.subject().as_raw() {
        return Err(material("the root's name has a form that cannot be repeated"));
    }
    Ok(cross)
}

fn name(subject: &X509Name<'_>) -> Result<DistinguishedName, CaError> {
    let mut name = DistinguishedName::new();
    for attribute in subject.iter_attributes() {
        let oid = attribute
            .attr_type()
            .iter()
            .ok_or_else(|| material("the root's name has a strange attribute"))?;
        name.push(DnType::CustomDnType(oid.collect()), value(attribute)?);
    }
    Ok(name)
}

fn value(attribute: &AttributeTypeAndValue<'_>) -> Result<DnValue, CaError> {
    let bytes = attribute.attr_value().data;
    let text = || std::str::from_utf8(bytes).map_err(material);
    Ok(match attribute.attr_value().header.tag() {
        Tag::Utf8String => DnValue::Utf8String(text()?.into()),
        Tag::PrintableString => DnValue::PrintableString(text()?.try_into().map_err(material)?),
        Tag::Ia5String => DnValue::Ia5String(text()?.try_into().map_err(material)?),
        Tag::T61String => DnValue::TeletexString(text()?.try_into().map_err(material)?),
        other => return Err(material(format!("the root's name has a text of type {other}"))),
    })
}

fn key_id(root: &X509Certificate<'_>) -> Option<Vec<u8>> {
    root.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
        _ => None,
    })
}

fn material(error: impl ToString) -> CaError {
    CaError::Material(error.to_string())
}

#[cfg(test)]
mod tests {
    use rcgen::{Issuer, KeyPair};

    use super::*;
    use crate::ca::issuer::Supplied;
    use crate::ca::state::Root;
    use crate::identity::TrustDomain;

    const HOUR: Duration = Duration::from_secs(3600);

    fn domain() -> TrustDomain {
        TrustDomain::parse("td.test").unwrap()
    }

    /// A root of an operator's, with an intermediate that has room for so many more below it.
    fn supplied(name: DnValue, room: Option<u8>) -> Root {
        let params = |name: DnValue, room: Option<u8>| {
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, name);
            params.distinguished_name.push(DnType::CountryName, "AQ");
            params.is_ca =
                IsCa::Ca(room.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params
        };
        let (root, root_key) = (params(name, None), KeyPair::generate().unwrap());
        let (below, key) = (params(DnValue::from("online"), room), KeyPair::generate().unwrap());
        let certificate = below.signed_by(&key, &Issuer::from_params(&root, &root_key)).unwrap().pem();
        let root = root.self_signed(&root_key).unwrap().pem();
        let supplied = Supplied { certificate: &certificate, key: &key.serialize_pem(), root: &root };
        supplied.check(&domain(), HOUR, SystemTime::now()).unwrap()
    }

    fn own() -> Root {
        Root::create_next(&domain(), SystemTime::now()).unwrap()
    }

    /// Whether an agent that knows the first of these roots only believes what the last one signs.
    fn leads(way: &[&Root]) -> bool {
        let (first, last) = (way.first().unwrap(), way.last().unwrap());
        let crosses: Vec<_> = way[1..]
            .iter()
            .rev()
            .flat_map(|root| super::super::state::certificates(root.cross.as_deref().unwrap()).unwrap())
            .collect();
        let bundle = first.ca(&domain()).unwrap().bundle().clone();
        leads_to(&bundle, &last.ca(&domain()).unwrap(), &crosses, HOUR, SystemTime::now()).is_ok()
    }

    fn follow(mut next: Root, before: &Root) -> Result<Root, CaError> {
        next.follow(before, &domain(), SystemTime::now()).map(|()| next)
    }

    #[test]
    fn the_way_leads_from_own_roots_to_supplied_ones_and_back_and_over_several() {
        let printable = DnValue::PrintableString("offline root".try_into().unwrap());
        let first = own();
        let second = follow(own(), &first).unwrap();
        let third = follow(supplied(printable, None), &second).unwrap();
        let fourth = follow(own(), &third).unwrap();
        let fifth = follow(supplied(DnValue::from("another"), None), &fourth).unwrap();
        for way in [
            &[&first, &second][..],
            &[&second, &third],
            &[&third, &fourth],
            &[&first, &second, &third],
            &[&third, &fourth, &fifth],
        ] {
            assert!(leads(way), "{}", way.len());
        }
        let unknown = own();
        assert!(!leads(&[&unknown, &second]), "the cross is by another root");
    }

    #[test]
    fn an_intermediate_without_room_below_it_cannot_vouch_and_says_so() {
        let before = supplied(DnValue::from("root"), Some(0));
        let error = follow(own(), &before).unwrap_err().to_string();
        assert!(error.contains("pathLenConstraint"), "{error}");
        let before = supplied(DnValue::from("root"), Some(1));
        let next = follow(own(), &before).unwrap();
        assert!(leads(&[&before, &next]));
        let after = follow(own(), &next).unwrap();
        assert!(!leads(&[&before, &next, &after]), "room for one is no room for two");
    }

    #[test]
    fn it_ends_with_whichever_ends_first_and_carries_the_roots_key_and_name() {
        let before = own();
        let root = supplied(DnValue::from("root"), None);
        let next = follow(root.clone(), &before).unwrap();
        let cross = super::super::state::certificates(next.cross.as_deref().unwrap()).unwrap();
        let (der, cross) = (root.der().unwrap(), cross[0].clone());
        let (_, root) = X509Certificate::from_der(&der).unwrap();
        let (_, cross) = X509Certificate::from_der(&cross).unwrap();
        assert_eq!(cross.public_key().raw, root.public_key().raw);
        assert_eq!(cross.subject().as_raw(), root.subject().as_raw());
        assert_eq!(key_id(&cross), key_id(&root));
        assert!(cross.is_ca() && cross.validity().not_after.timestamp() as u64 <= before.not_after);
    }
}
