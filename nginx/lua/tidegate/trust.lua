--- The CAs that peers' certificates are verified against, where nginx reads them.
--
-- Why: nginx reads a CA for its peers when it loads a configuration, and refuses the whole of it if
-- the file is missing. So it is given copies, which are always there: `STATE/trust/NAME.pem`. In
-- the place of a CA that cannot be used lies a certificate whose key nobody has, so that nothing is
-- trusted. A CA that changes is copied again and takes a reload.

local posix = require "tidegate.posix"
local x509 = require "tidegate.x509"

local find = string.find
local ipairs = ipairs
local md5 = ngx.md5
local os_rename = os.rename
local pairs = pairs

local SYSTEM = {
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
}

local _M = {}

local settings              -- {state, untrusted, ca_bundle}
local loaded = {}           -- name → digest of the copy that the running configuration was made of
local untrusted             -- digest of the certificate that stands for nothing
local seen = {}             -- name → {stamp, problem} in this worker


local function copy_of(name)
    return settings.state .. "/trust/" .. name .. ".pem"
end


-- The file that is meant: the system's where none is named.
local function source_of(path)
    if path ~= "" then
        return path
    elseif settings.ca_bundle ~= "" then
        return settings.ca_bundle
    end
    for _, bundle in ipairs(SYSTEM) do
        if posix.stamp(bundle) then
            return bundle
        end
    end
    return SYSTEM[1]
end


-- What the file says, if it is a CA; else why not.
local function read(path)
    local source = source_of(path)
    local data, stamp, missing = posix.read_stamped(source)
    if not data then
        return nil, {
            reason = missing and "backend_ca_missing" or "backend_ca_unreadable",
            message = "the CA for the backend cannot be read: " .. stamp,
        }
    end
    local chain, err = x509.chain(data)
    if not chain then
        return nil, {
            reason = "backend_ca_unreadable",
            message = "the CA for the backend, " .. source .. ", " .. err,
        }
    end
    return data
end


local function write(name, data)
    local copy = copy_of(name)
    local ok, err = posix.write(copy .. ".new", data)
    if ok then
        ok, err = os_rename(copy .. ".new", copy)
    end
    if not ok then
        ngx.log(ngx.ERR, "tidegate: the copy of a CA cannot be written: ", err)
    end
end


-- Has the copy say what the file says; one that cannot be used any more stays as it was.
local function refresh(name, path)
    local data, problem = read(path)
    local before = posix.read(copy_of(name))
    if data and data ~= before then
        write(name, data)
    elseif not data and not before then
        write(name, posix.read(settings.untrusted))
    end
    return problem
end


--- Sets where things are, and notes what the configuration that is being loaded was made of.
-- @param options `{state, untrusted, ca_bundle}`
-- @param names set of the names of CAs in it
function _M.configure(options, names)
    settings = options
    untrusted = md5(posix.read(options.untrusted) or "")
    loaded = {}
    for name in pairs(names) do
        loaded[name] = md5(posix.read(copy_of(name)) or "")
    end
end


--- Makes the copies that a configuration needs before it is tested.
-- @param cas path by name
function _M.prepare(cas)
    posix.mkdir(settings.state .. "/trust")
    for name, path in pairs(cas) do
        if find(name, "^%w+$") then
            refresh(name, path)
        end
    end
end


--- Takes in what has become of a CA's file, if it has changed.
-- @return nil, or `{reason, message, refused}`; and whether a reload is needed
function _M.look(name, path)
    local stamp, err = posix.stamp(source_of(path))
    stamp = stamp or err
    local before = seen[name]
    if not before or before.stamp ~= stamp then
        before = { stamp = stamp, problem = refresh(name, path) }
        before.digest = md5(posix.read(copy_of(name)) or "")
        seen[name] = before
    end
    local problem = before.problem
    if problem then
        problem.refused = _M.refused(name)
    end
    return problem, before.digest ~= loaded[name]
end


--- Whether nothing is trusted in the running configuration, for want of a CA.
function _M.refused(name)
    return loaded[name] == untrusted
end


return _M
