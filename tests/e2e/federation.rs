//! Two trust domains, each with its own authority and agent: they learn each other's roots from bundle endpoints,
//! let in whom a policy names, and nobody for longer than they are federated.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::Value;
use tests::host::{Actor, bin};
use tests::{Mode, Options, Process, World, wait_until};

/// The trust domain of node 2; the world's own is node 1's.
const OTHER: &str = "other.test";
const SOON: Duration = Duration::from_secs(15);

/// A world, and on its node 2 another trust domain.
struct Scene {
    world: World,
    authority: Option<Process>,
}

impl Scene {
    /// Each authority serves its bundle, by one profile each, and fetches the other's.
    fn new(options: Options) -> Self {
        let mut world = World::new(options).unwrap();
        world.pod("client", "n1", Mode::Strict).unwrap();
        world.pod("server", "n2", Mode::Strict).unwrap();
        let scene = Self { world, authority: None };
        fs::create_dir_all(scene.dir()).unwrap();
        scene.web_certificate();
        scene
    }

    fn dir(&self) -> PathBuf {
        self.world.dir().join("other")
    }

    fn file(&self, name: &str) -> String {
        self.dir().join(name).to_string_lossy().into_owned()
    }

    /// A certificate for the first authority's endpoint, and the root of its own little Web PKI.
    fn web_certificate(&self) {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let names = vec!["192.168.50.1".to_owned()];
        let leaf = CertificateParams::new(names).unwrap().signed_by(&key, &root).unwrap();
        fs::write(self.file("web-root.pem"), root.pem()).unwrap();
        fs::write(self.file("web.pem"), leaf.pem()).unwrap();
        fs::write(self.file("web.key"), key.serialize_pem()).unwrap();
    }

    /// The second authority's configuration; `federation` is its list of other trust domains.
    fn configure_other(&self, directory: &str, federation: &str) {
        let config = format!(
            "trustDomain: {OTHER}\nlisten: 192.168.50.2:15012\nstateDir: {}\ndirectory: {{file: {directory}}}\nfederation:\n  bundleEndpoint: {{listen: '192.168.50.2:8443', refreshHintSeconds: 5}}\n  trustDomains: {federation}\n",
            self.file("state"),
        );
        fs::write(self.file("authority.yaml"), config).unwrap();
    }

    fn of_the_world(&self) -> String {
        format!(
            "[{{trustDomain: test.local, endpoint: 'https://192.168.50.1:8443/', profile: https_web, roots: {}}}]",
            self.file("web-root.pem")
        )
    }

    fn other_command(&self, args: &[&str]) -> String {
        let output = Command::new(bin("hauberk").unwrap())
            .args(["authority", "--config", &self.file("authority.yaml")])
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn start_other_authority(&mut self) {
        self.authority = None;
        let config = self.file("authority.yaml");
        let host = self.world.host("n2");
        let mut command =
            host.command(&bin("hauberk").unwrap(), &["authority", "--config", &config]).unwrap();
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir().join("log")).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.authority = Some(Process::spawn(command).unwrap());
        let listening = self.world.host("n2").wait_listening("192.168.50.2:15012".parse().unwrap());
        assert!(listening.is_ok(), "{}", fs::read_to_string(self.dir().join("log")).unwrap());
    }

    /// Everything, with these directories for the two sides.
    fn start(&mut self, ours: &str, theirs: &str) {
        self.configure_other(theirs, &self.of_the_world());
        // Makes its root: the first authority is given it, to verify the endpoint with.
        fs::write(self.file("bundle.pem"), self.other_command(&["bundle"])).unwrap();
        let federation = format!(
            "federation:\n  bundleEndpoint: {{listen: '192.168.50.1:8443', certificate: {}, key: {}, refreshHintSeconds: 5}}\n  trustDomains: [{{trustDomain: {OTHER}, bundle: {}, endpoint: 'https://192.168.50.2:8443', profile: https_spiffe, spiffeId: 'spiffe://{OTHER}/hauberk/authority'}}]\n",
            self.file("web.pem"),
            self.file("web.key"),
            self.file("bundle.pem"),
        );
        self.world.configure(|options| options.authority_yaml = federation);
        self.world.prepare().unwrap();
        self.world.start_authority().unwrap();
        self.start_other_authority();
        let shared = self.world.directory_file();
        let token = self.other_command(&["token", "--node", "n2"]);
        let ours_instead = |yaml: String| yaml.replace(&*shared.to_string_lossy(), ours);
        // A directory of its own for each; what else the second agent has is its own trust domain's.
        let config = self.world.configure_agent("n1").unwrap();
        let first = self.world.authority_command(&["token", "--node", "n1"]).unwrap();
        fs::write(config.with_file_name("token"), first).unwrap();
        fs::write(&config, ours_instead(fs::read_to_string(&config).unwrap())).unwrap();
        let config = self.world.configure_agent("n2").unwrap();
        fs::write(config.with_file_name("token"), token).unwrap();
        let yaml = fs::read_to_string(&config)
            .unwrap()
            .replace("trustDomain: test.local", &format!("trustDomain: {OTHER}"))
            .replace("trustDomainAliases: [other.test]", "trustDomainAliases: [test.local]")
            .replace("192.168.50.1:15012", "192.168.50.2:15012")
            .replace(&*self.world.dir().join("bundle.pem").to_string_lossy(), &self.file("bundle.pem"))
            .replace(&*shared.to_string_lossy(), theirs);
        fs::write(&config, yaml).unwrap();
        for node in ["n1", "n2"] {
            self.world.agent(node).restart().unwrap();
        }
    }

    /// Each side's directory has its own pod, and the other's by its trust domain alone.
    fn directories(&self) -> [String; 2] {
        let all = [("client", "n1", "test.local"), ("server", "n2", OTHER)];
        [("n1", "ours.yaml"), ("n2", "theirs.yaml")].map(|(node, file)| {
            let entries = all.map(|(name, on, trust_domain)| {
                let pod = self.world.get(name);
                let place = match on == node {
                    true => format!("node: {on}, netns: {}", pod.host.netns().display()),
                    false => format!("trustDomain: {trust_domain}"),
                };
                format!(
                    "  - {{name: {name}, namespace: demo, serviceAccount: {name}, addresses: [{}], {place}}}\n",
                    pod.v4
                )
            });
            fs::write(self.file(file), format!("workloads:\n{}", entries.concat())).unwrap();
            self.file(file)
        })
    }

    fn reaches(&self) -> bool {
        let to = self.world.get("server").v4(8080);
        self.world.get("client").host.actor(&["poke", &to]).unwrap()["end"] == "data"
    }

    fn stay(&self) -> Actor {
        let to = self.world.get("server").v4(8080);
        self.world.get("client").host.actor_server(&["stay", &to]).unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.world.dir().join("authority.log")).unwrap()
    }
}

fn allow(from: &str) -> String {
    format!(
        "---\napiVersion: hauberk.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: p, namespace: demo}}\nspec: {{selector: {{all: true}}, action: allow, from: [{from}]}}\n"
    )
}

#[test]
fn two_trust_domains_meet_where_a_policy_says_so_and_only_while_they_are_federated() {
    let options = Options { node_scope: false, policies: Some("---\n".into()), ..Options::default() };
    let mut scene = Scene::new(options);
    let [ours, theirs] = scene.directories();
    scene.start(&ours, &theirs);
    let _echo = scene.world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let denied = |scene: &Scene| {
        let labels = ["role=\"server\"", "reason=\"denied_by_policy\""];
        scene.world.agent_ref("n2").metric("hauberk_tls_handshakes_total", &labels).unwrap()
    };

    // The server is proven to the client's agent; the client is to the server's, which has no policy for it.
    wait_until(SOON, "a foreign identity is refused without a policy", || {
        assert!(!scene.reaches(), "nobody let it in");
        denied(&scene) >= 1.0
    });
    scene.world.write_policies(&allow("{trustDomain: third.test}")).unwrap();
    assert!(!scene.reaches(), "another trust domain is named");
    let tap = scene.world.tap().unwrap();
    scene
        .world
        .write_policies(&allow("{trustDomain: test.local, namespace: demo, serviceAccount: client}"))
        .unwrap();
    wait_until(SOON, "the policy lets the client in", || scene.reaches());
    let seen = tap.finish().unwrap();
    assert_eq!(seen.plaintext_bytes, 0, "{:?}", seen.plaintext_flows);

    // A new root there is learnt here before it signs, and nothing is cut.
    let mut live = scene.stay();
    scene.other_command(&["rotate-root", "--no-wait"]);
    wait_until(Duration::from_secs(30), "the first authority learns of the second's new root", || {
        scene.log().matches("the bundle of a federated trust domain changed").count() >= 1
    });
    assert!(scene.reaches(), "with both roots");

    // What was fetched is kept: over a restart of the authority that fetched it, and of an agent, while nobody
    // answers at the other's endpoint.
    scene.authority = None;
    scene.world.stop_authority();
    scene.world.start_authority().unwrap();
    scene.world.agent("n1").stop(SOON).unwrap();
    assert_eq!(live.said().unwrap()["ended"], "reset", "the agent was stopped, so its streams are");
    scene.world.agent("n1").restart().unwrap();
    wait_until(SOON, "what was known of the other trust domain is known still", || scene.reaches());

    // The end of federation is the end of what came by it.
    let mut live = scene.stay();
    wait_until(SOON, "a connection is open", || {
        scene.world.agent_ref("n2").metric("hauberk_connections_open", &["inbound"]).unwrap() >= 1.0
    });
    scene.configure_other(&theirs, "[]");
    scene.start_other_authority();
    let ended: Value = live.said().unwrap();
    assert_eq!(ended["ended"], "reset", "{ended}");
    let log = scene.world.agent_ref("n2").log();
    assert!(
        log.contains("the end of federation with test.local"),
        "{}",
        scene.world.agent_ref("n2").log_tail(20)
    );
    assert!(!scene.reaches(), "and nobody comes in again");
}

#[test]
fn a_trust_domain_is_renamed_node_by_node_with_aliases() {
    let options = Options {
        agent_yaml: "drainSeconds: 5\ntrustDomainAliases: [other.test]\n".into(),
        policies: Some(allow("{namespace: demo, serviceAccount: client}")),
        ..Options::default()
    };
    let mut scene = Scene::new(options);
    // The same directory for both: each takes every workload for one of its own trust domain.
    let shared = scene.world.directory_file().to_string_lossy().into_owned();
    scene.start(&shared, &shared);
    let _echo = scene.world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    wait_until(SOON, "identities under the other name are taken for our own", || scene.reaches());
    let many =
        scene.world.get("client").host.actor(&["many", &scene.world.get("server").v4(8080), "50", "4"]);
    assert_eq!(many.unwrap()["ok"], 50);
    // One connection between the two nodes carries them.
    let open = scene.world.agent_ref("n1").metric("hauberk_pool_connections", &[]).unwrap();
    assert!(open >= 1.0, "pooled: {open}");
    scene.world.write_policies(&allow("{namespace: demo, serviceAccount: nobody}")).unwrap();
    wait_until(SOON, "policies hold for them", || !scene.reaches());
}
