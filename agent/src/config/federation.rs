//! Other trust domains: where their bundles come from, and what it takes for their identities to be let in.

use std::collections::HashSet;
use std::path::PathBuf;

use serde::Deserialize;

use super::Fault;
use crate::identity::federation::{Admit, MAX_DOMAINS};
use crate::identity::{SpiffeId, TrustDomain};

/// Other trust domains.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FederationConfig {
    /// Each with the source of its bundle.
    pub trust_domains: Vec<FederatedConfig>,
}

/// Another trust domain.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FederatedConfig {
    /// Its name.
    pub trust_domain: TrustDomain,
    /// Its bundle, as a SPIFFE bundle (JSON) or as PEM roots. Without an endpoint it is read again when it changes;
    /// with one it holds until the endpoint has answered.
    pub bundle: Option<PathBuf>,
    /// `https://host[:port][/path]` of its SPIFFE bundle endpoint.
    pub endpoint: Option<String>,
    /// How the endpoint's server is verified.
    pub profile: Option<Profile>,
    /// With `https_spiffe`: who must answer there.
    pub spiffe_id: Option<SpiffeId>,
    /// With `https_web`: PEM roots that the server is verified with. Default: this machine's.
    pub roots: Option<PathBuf>,
    /// What it takes for its identities to be let in.
    #[serde(default)]
    pub admit: Admit,
}

/// How a bundle endpoint's server is verified (SPIFFE Federation, section 5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// By its host's name, with the roots of the Web PKI.
    HttpsWeb,
    /// By its SPIFFE ID, with the bundle that is held of its trust domain.
    HttpsSpiffe,
}

impl FederationConfig {
    /// Checks what types cannot say.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn check(&self, own: &TrustDomain) -> Result<(), Fault> {
        let mut names = HashSet::new();
        if self.trust_domains.len() > MAX_DOMAINS {
            return Err(("federation.trustDomains".into(), format!("at most {MAX_DOMAINS}")));
        }
        for (index, entry) in self.trust_domains.iter().enumerate() {
            let at =
                |field: &str| format!("federation.trustDomains[{index}] ({}).{field}", entry.trust_domain);
            if entry.trust_domain == *own || !names.insert(&entry.trust_domain) {
                return Err((at("trustDomain"), "is our own, or given twice".into()));
            }
            entry.check().map_err(|(field, words)| (at(field), words.into()))?;
        }
        Ok(())
    }
}

impl FederatedConfig {
    fn check(&self) -> Result<(), (&'static str, &'static str)> {
        let Some(endpoint) = &self.endpoint else {
            return match &self.bundle {
                None => Err(("bundle", "give the bundle's file, or an endpoint")),
                Some(_) if self.profile.is_some() || self.spiffe_id.is_some() || self.roots.is_some() => {
                    Err(("profile", "profile, spiffeId and roots are an endpoint's, and there is none"))
                }
                Some(_) => Ok(()),
            };
        };
        let uri: Option<http::Uri> = endpoint.parse().ok();
        // The specification allows no user information, and http shows nothing to be trusted.
        let good = uri.is_some_and(|uri| {
            let authority = uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
            uri.scheme_str() == Some("https") && !authority.is_empty() && !authority.contains('@')
        });
        if !good {
            return Err(("endpoint", "must be https://host[:port][/path]"));
        }
        match (self.profile, &self.spiffe_id, &self.bundle) {
            (None, ..) => Err(("profile", "say how the endpoint is verified: https_web or https_spiffe")),
            (Some(Profile::HttpsWeb), Some(_), _) => Err((
                "spiffeId",
                "is of https_spiffe; with https_web the server is verified by its host's name",
            )),
            (Some(Profile::HttpsSpiffe), None, _) => {
                Err(("spiffeId", "name who must answer, such as spiffe://TRUST-DOMAIN/hauberk/authority"))
            }
            (Some(Profile::HttpsSpiffe), Some(id), _) if id.trust_domain() != self.trust_domain.as_str() => {
                Err(("spiffeId", "must be in the trust domain itself, whose bundle it is verified with"))
            }
            (Some(Profile::HttpsSpiffe), _, None) => Err((
                "bundle",
                "give the bundle to verify the endpoint with at first; https_spiffe needs one",
            )),
            (Some(Profile::HttpsSpiffe), ..) if self.roots.is_some() => {
                Err(("roots", "are of https_web; with https_spiffe the bundle verifies the server"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(yaml: &str) -> Result<(), String> {
        let config: FederationConfig = serde_yaml::from_str(yaml).map_err(|e| e.to_string())?;
        let own = TrustDomain::parse("td.test").unwrap();
        config.check(&own).map_err(|(field, words)| format!("{field}: {words}"))
    }

    fn entry(more: &str) -> Result<(), String> {
        check(&format!("trustDomains: [{{trustDomain: other.test, {more}}}]"))
    }

    #[test]
    fn an_entry_that_could_never_be_trusted_is_refused_by_its_field() {
        for good in [
            "bundle: /b",
            "bundle: /b, admit: all",
            "endpoint: 'https://host/x', profile: https_web",
            "endpoint: 'https://host:8443', profile: https_web, roots: /r",
            "endpoint: 'https://10.0.0.1:1/', profile: https_spiffe, spiffeId: 'spiffe://other.test/a', bundle: /b",
        ] {
            assert_eq!(entry(good), Ok(()), "{good}");
        }
        for (bad, field) in [
            ("admit: all", ").bundle"),
            ("bundle: /b, roots: /r", ").profile"),
            ("endpoint: 'http://host/', profile: https_web", ").endpoint"),
            ("endpoint: 'https://u@host/', profile: https_web", ").endpoint"),
            ("endpoint: 'https://host/'", ").profile"),
            ("endpoint: 'https://host/', profile: https_spiffe, bundle: /b", ").spiffeId"),
            (
                "endpoint: 'https://host/', profile: https_web, spiffeId: 'spiffe://other.test/a'",
                ").spiffeId",
            ),
            (
                "endpoint: 'https://host/', profile: https_spiffe, spiffeId: 'spiffe://third.test/a', bundle: /b",
                ").spiffeId",
            ),
            ("endpoint: 'https://h/', profile: https_spiffe, spiffeId: 'spiffe://other.test/a'", ").bundle"),
            ("bundle: /b, admit: some", "some"),
        ] {
            let error = entry(bad).unwrap_err();
            assert!(error.contains(field), "{bad}: {error}");
        }
        let own = check("trustDomains: [{trustDomain: td.test, bundle: /b}]").unwrap_err();
        assert!(own.contains("our own"), "{own}");
    }
}
