//! criu's image files, as far as they are needed.
//!
//! Every file begins with one or two 32-bit little-endian magic numbers (`criu/include/magic.h`). Then come
//! protobuf messages, each after its length as a 32-bit little-endian number.

mod frame;
pub mod inventory;
pub mod pagemap;
pub mod tree;

mod memory_map;
mod verify;

pub use frame::FormatError;
pub use memory_map::{Area, areas};
pub use verify::{HiddenError, check_hidden};

use crate::image_dir::ImageDir;

/// Why an image file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It could not be read or written.
    #[error("could not access the image file {name}")]
    Io {
        /// The file.
        name: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its content makes no sense.
    #[error("the image file {name} is damaged or of an unknown format")]
    Format {
        /// The file.
        name: String,
        /// Why.
        #[source]
        source: FormatError,
    },
}

fn read(images: &ImageDir, name: &str) -> Result<Vec<u8>, ImageError> {
    images.read(name).map_err(|source| ImageError::Io { name: name.to_owned(), source })
}

fn format(name: &str) -> impl FnOnce(FormatError) -> ImageError {
    let name = name.to_owned();
    move |source| ImageError::Format { name, source }
}
