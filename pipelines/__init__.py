from pipelines.library_warnings import leave_out_pointless_warnings

# On import, since some of them are logged while a library is imported.
leave_out_pointless_warnings()
