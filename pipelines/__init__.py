from pipelines.library_warnings import leave_out_pointless_warnings

# On import, since some are given while a library is imported.
leave_out_pointless_warnings()
