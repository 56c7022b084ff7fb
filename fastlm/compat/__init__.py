"""fastlm under the names and layouts of other packages."""
