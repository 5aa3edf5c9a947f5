//! The layout (OCI image specification 1.1): blobs by their digests, a manifest, and an index of one image.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs::File;
use std::path::Path;

use anyhow::Result;
use oci_spec::image::{
    Arch, ConfigBuilder, Descriptor, DescriptorBuilder, Digest, ImageConfigurationBuilder, ImageIndexBuilder,
    ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, PlatformBuilder, RootFsBuilder,
};
use sha2::{Digest as _, Sha256};
use tar::Builder;

use super::layer::{Layer, compress, header};

/// The image's name, and its archive's.
pub(super) const NAME: &str = "hauberk";
/// Nobody in particular. What an agent needs more, its pod says.
const USER: &str = "65532:65532";
/// The time of everything: the same source makes the same bytes.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// An image, ready to be written.
#[derive(Debug)]
pub(super) struct Image {
    /// By their digests in hexadecimal.
    blobs: BTreeMap<String, Vec<u8>>,
    index: Vec<u8>,
    layout: Vec<u8>,
    digest: String,
    /// The layers, not compressed.
    #[cfg(test)]
    archives: Vec<Vec<u8>>,
}

impl Image {
    /// Puts layers together, the lowest first.
    pub(super) fn new(layers: impl IntoIterator<Item = Layer>) -> Result<Self> {
        let mut blobs = Blobs::default();
        let (mut diff_ids, mut descriptors) = (Vec::new(), Vec::new());
        #[cfg(test)]
        let mut archives = Vec::new();
        for layer in layers {
            let archive = layer.archive()?;
            diff_ids.push(format!("sha256:{}", hash(&archive)));
            descriptors.push(blobs.add(MediaType::ImageLayerGzip, compress(&archive)?)?);
            #[cfg(test)]
            archives.push(archive);
        }
        let run = ConfigBuilder::default()
            .user(USER)
            .entrypoint(vec![format!("/{}", super::PROGRAM)])
            .working_dir("/")
            .build()?;
        let (arch, os) = (Arch::Amd64, Os::Linux);
        let config = ImageConfigurationBuilder::default()
            .created(CREATED)
            .architecture(arch.clone())
            .os(os.clone())
            .config(run)
            .rootfs(RootFsBuilder::default().typ("layers").diff_ids(diff_ids).build()?)
            .build()?;
        let config = blobs.add(MediaType::ImageConfig, serde_json::to_vec(&config)?)?;
        let manifest = ImageManifestBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageManifest)
            .config(config)
            .layers(descriptors)
            .build()?;
        let mut manifest = blobs.add(MediaType::ImageManifest, serde_json::to_vec(&manifest)?)?;
        let digest = manifest.digest().to_string();
        manifest.set_platform(Some(PlatformBuilder::default().architecture(arch).os(os).build()?));
        // One annotation only: a map of more would be written in any order.
        let name = format!("{NAME}:{}", env!("CARGO_PKG_VERSION"));
        manifest
            .set_annotations(Some(HashMap::from([("org.opencontainers.image.ref.name".to_owned(), name)])));
        let index = ImageIndexBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageIndex)
            .manifests(vec![manifest])
            .build()?;
        Ok(Self {
            blobs: blobs.0,
            index: serde_json::to_vec(&index)?,
            layout: serde_json::to_vec(&OciLayoutBuilder::default().image_layout_version("1.0.0").build()?)?,
            digest,
            #[cfg(test)]
            archives,
        })
    }

    /// The manifest's digest, by which registries call the image.
    pub(super) fn digest(&self) -> &str {
        &self.digest
    }

    /// Writes the layout as one archive.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let mut builder = Builder::new(File::create(path)?);
        let mut add = |name: &str, content: &[u8]| {
            let mut header = header();
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, name, content)
        };
        for (digest, blob) in &self.blobs {
            add(&format!("blobs/sha256/{digest}"), blob)?;
        }
        add("index.json", &self.index)?;
        add("oci-layout", &self.layout)?;
        builder.finish()?;
        Ok(())
    }

    /// Unpacks every layer, as a runtime does.
    #[cfg(test)]
    pub(super) fn unpack(&self, to: &Path) -> Result<()> {
        for archive in &self.archives {
            tar::Archive::new(archive.as_slice()).unpack(to)?;
        }
        Ok(())
    }
}

#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    fn add(&mut self, kind: MediaType, content: Vec<u8>) -> Result<Descriptor> {
        let hash = hash(&content);
        let digest: Digest = format!("sha256:{hash}").parse()?;
        let descriptor = DescriptorBuilder::default()
            .media_type(kind)
            .digest(digest)
            .size(content.len() as u64)
            .build()?;
        self.0.insert(hash, content);
        Ok(descriptor)
    }
}

fn hash(content: &[u8]) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(content) {
        // A string takes whatever is written.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
