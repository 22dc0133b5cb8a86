--- The admin API: docs/admin-api.md, call by call.
--
-- Why: the one place that knows which call there is at which path. It reads and checks; who may
-- call is the business of `access`, what is to be done that of `push`, `lease` and `site`.

local access = require "tidegate.access"
local answer = require "tidegate.answer"
local certificates = require "tidegate.certificates"
local codec = require "tidegate.codec"
local exposition = require "tidegate.exposition"
local json = require "tidegate.json"
local lease = require "tidegate.lease"
local limits = require "tidegate.limits"
local live = require "tidegate.live"
local posix = require "tidegate.posix"
local process = require "ngx.process"
local push = require "tidegate.push"
local site = require "tidegate.site"
local store = require "tidegate.store"
local wire = require "tidegate.wire"

local ctl = ngx.shared.tidegate_ctl

local find = string.find
local floor = math.floor
local gsub = string.gsub
local ipairs = ipairs
local match = string.match
local ngx = ngx
local pairs = pairs
local sub = string.sub
local tostring = tostring
local type = type

local MAX_ERRORS = 100
local CHUNK = 65536     -- bytes of a long answer that are put together before they are sent

local WRITER_RULE = "expected 1 to 128 printable ASCII characters"

local _M = {}

local settings          -- {version, features}


--- Sets what does not change while a configuration is in force.
-- @param options `{token, token_file, status_password, version, features}`; no token and no file:
--   no authentication
function _M.configure(options)
    settings = options
    access.configure(options)
end


-- The body as a JSON object; answers and gives nil where it is none.
local function read_object()
    ngx.req.read_body()
    local text = ngx.req.get_body_data()
    if not text then
        local file = ngx.req.get_body_file()
        text = file and posix.read(file) or ""
    end
    local value, err = json.decode(text)
    if type(value) ~= "table" or #value > 0 or not find(text, "^%s*{") then
        local found = type(value) == "table" and "a list" or type(value)
        return answer.refuse(400, "bad_json",
                             "the body is not a JSON object: " .. (err or "it is " .. found))
    end
    return value
end


-- Takes the lease for the writer of a push; answers and gives nil where that fails.
local function take_lease(writer)
    if not wire.is_writer(writer) then
        return answer.invalid({ { field = "writer", message = WRITER_RULE } })
    end
    local expires_in, holder, left = lease.take(writer)
    if not expires_in then
        return answer.refuse(423, "lease_held", "writer " .. holder .. " holds the lease",
                             { writer = holder, expires_in = left })
    end
    return expires_in
end


-- What this build can do that not every build can; a part that works has noted it itself.
local function features()
    local list = json.array()
    for index, name in ipairs(settings.features) do
        list[index] = name
    end
    if ctl:get("stream") then
        list[#list + 1] = "stream"
    end
    return list
end


local function get_status()
    local summary = store.summary()
    local writer, expires_in = lease.holder()
    local version = ngx.config.nginx_version
    local lua = ngx.config.ngx_lua_version
    return answer.send(200, {
        instance = ctl:get("instance"),
        revision = summary.revision,
        generation = site.generation(),
        writer = writer,
        lease_expires_in = expires_in,
        upstreams = summary.upstreams,
        peers = summary.peers,
        source = summary.source,
        persisted_revision = ctl:get("persisted_revision") or 0,
        dict = { capacity_bytes = summary.capacity, free_bytes = summary.free },
        versions = {
            tidegate = settings.version,
            nginx = floor(version / 1000000) .. "." .. floor(version / 1000) % 1000 .. "."
                .. version % 1000,
            ngx_lua = floor(lua / 1000000) .. "." .. floor(lua / 1000) % 1000 .. "." .. lua % 1000,
        },
        nginx_version = version,
        features = features(),
        certificates_serial = certificates.serial(),
        workers = ngx.worker.count(),
        master_pid = process.get_master_pid(),
        started_at = ctl:get("started_at"),
    })
end


local function get_membership()
    ngx.header["Content-Type"] = "application/json"
    ngx.print('{"revision":', tostring(ctl:get("revision") or 0), ',"upstreams":{')
    local names, parts, size, first = {}, {}, 0, true
    for index, name in ipairs(store.names()) do
        names[index] = name
    end
    table.sort(names)
    for _, name in ipairs(names) do
        local blob = store.get(name)
        if blob then
            local part = (first and "" or ",") .. json.quote(name) .. ":"
                .. wire.show_upstream(name, codec.decode(blob))
            first = false
            parts[#parts + 1] = part
            size = size + #part
            if size > CHUNK then
                ngx.print(parts)
                parts, size = {}, 0
            end
        end
        store.breathe()
    end
    ngx.print(parts, "}}\n")
end


-- What a writer that comes back compares, instead of all the peers.
local function get_versions()
    local versions = {}
    for _, name in ipairs(store.names()) do
        local blob = store.get(name)
        local head = blob and codec.head(blob)
        if head then
            versions[name] = codec.version(blob, head)
        end
        store.breathe()
    end
    return answer.send(200, { revision = ctl:get("revision") or 0, versions = versions })
end


local function get_upstream(name)
    local blob = store.get(name)
    if not blob then
        return answer.refuse(404, "not_found", "there is no upstream " .. name)
    end
    return answer.send(200, wire.show_upstream(name, codec.decode(blob)))
end


-- Both kinds of push; `full` is PUT.
local function push_membership(full)
    local body, where = push.read(full)
    if body and take_lease(body.writer) then
        return push.apply(full, body, where)
    end
end


local function get_site()
    local generation, files = site.files()
    return answer.send(200, { generation = generation, files = files })
end


-- Whether a file of a site may have this name: `.stream` is for nginx's stream part.
local function is_file_name(name)
    return type(name) == "string" and #name <= 255
        and (limits.is_name(name)
             or find(name, "^[a-z0-9_][a-z0-9._-]*%.conf$")
             or find(name, "^[a-z0-9_][a-z0-9._-]*%.stream$")) ~= nil
end


local function put_site()
    local body = read_object()
    if not body or not take_lease(body.writer) then
        return
    end
    local errors = {}
    if type(body.generation) ~= "string" or #body.generation ~= 64
            or not find(body.generation, "^[0-9a-f]+$") then
        errors[1] = { field = "generation", message = "expected 64 lower-case hex digits" }
    end
    if type(body.files) ~= "table" then
        errors[#errors + 1] = { field = "files", message = "expected an object of file texts" }
    else
        for name, text in pairs(body.files) do
            local shown = tostring(name)
            if not is_file_name(name) then
                errors[#errors + 1] = {
                    field = "files",
                    message = "has the name " .. sub(shown, 1, 80)
                        .. "; expected [a-z0-9_][a-z0-9._-]*.conf or .stream",
                }
            elseif type(text) ~= "string" or find(text, "%z") then
                errors[#errors + 1] = { field = "files." .. shown, message = "expected text" }
            elseif limits.is_name(name) and limits.fault(name, text) then
                errors[#errors + 1] = {
                    field = "files." .. shown, message = limits.fault(name, text),
                }
            end
            if #errors >= MAX_ERRORS then
                break
            end
        end
    end
    if #errors > 0 then
        return answer.invalid(errors)
    end
    local result, refusal = site.apply(body.generation, body.files)
    if not result then
        if refusal.kind == "busy" then
            return answer.busy()
        end
        return answer.refuse(422, "site_refused", refusal.message, {
            stage = refusal.stage, file = refusal.file, line = refusal.line,
        })
    end
    return answer.send(200, { generation = body.generation, reloaded = result == "reloaded" })
end


local function get_certificates()
    local serial = certificates.serial()
    local hosts, backends = certificates.report()
    return answer.send(200, { serial = serial, hosts = hosts, backends = backends })
end


local function post_lease()
    local body = read_object()
    local expires_in = body and take_lease(body.writer)
    if expires_in then
        return answer.send(200, { writer = body.writer, expires_in = expires_in })
    end
end


local function delete_lease()
    local body = read_object()
    if not body then
        return
    end
    if not wire.is_writer(body.writer) then
        return answer.invalid({ { field = "writer", message = WRITER_RULE } })
    end
    lease.release(body.writer)
    return answer.send(200, { writer = body.writer })
end


local function get_health()
    return answer.send(200, { status = "ok" })
end


local function get_ready()
    local reason
    if (ctl:get("revision") or 0) == 0 then
        reason = "no membership has been pushed, and none was on disk"
    elseif site.generation() == "" then
        reason = "no site has been pushed, and none was on disk"
    end
    if reason then
        return answer.send(503, { status = "not ready", reason = reason })
    end
    return answer.send(200, { status = "ready" })
end


local function get_metrics()
    ngx.header["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
    exposition.print({
        generation = site.generation(),
        counts = live.counts,
        nginx = {
            active = ngx.var.connections_active,
            reading = ngx.var.connections_reading,
            waiting = ngx.var.connections_waiting,
            writing = ngx.var.connections_writing,
        },
    })
    certificates.print_metrics()
end


local OPEN_PATHS = {
    ["/healthz"] = { GET = get_health },
    ["/readyz"] = { GET = get_ready },
    ["/metrics"] = { GET = get_metrics },
}
local PATHS = {
    ["/v1/status"] = { GET = get_status },
    ["/v1/membership"] = {
        GET = get_membership,
        PATCH = function() return push_membership(false) end,
        PUT = function() return push_membership(true) end,
    },
    ["/v1/certificates"] = { GET = get_certificates },
    ["/v1/versions"] = { GET = get_versions },
    ["/v1/site"] = { GET = get_site, PUT = put_site },
    ["/v1/lease"] = { POST = post_lease, DELETE = delete_lease },
}
local UPSTREAM_PREFIX = "/v1/membership/"


--- Body of `content_by_lua` of the admin listener.
function _M.handle()
    local path = match(ngx.var.request_uri, "^[^?]*")
    local calls, argument = OPEN_PATHS[path], nil
    if not calls then
        if not access.authorized() then
            ngx.header["WWW-Authenticate"] = "Bearer"
            return answer.refuse(401, "unauthorized", "the bearer token is missing or wrong")
        end
        calls = PATHS[path]
        if not calls and sub(path, 1, #UPSTREAM_PREFIX) == UPSTREAM_PREFIX
                and #path > #UPSTREAM_PREFIX then
            argument = ngx.unescape_uri(gsub(sub(path, #UPSTREAM_PREFIX + 1), "%+", "%%2B"))
            calls = { GET = get_upstream }
        end
    end
    if not calls then
        return answer.refuse(404, "not_found", "there is no " .. path)
    end
    local method = ngx.req.get_method()
    local call = calls[method] or method == "HEAD" and calls.GET
    if not call then
        local allowed = {}
        for name in pairs(calls) do
            allowed[#allowed + 1] = name
        end
        table.sort(allowed)
        local methods = table.concat(allowed, ", ")
        ngx.header["Allow"] = methods
        return answer.refuse(405, "method_not_allowed", path .. " takes " .. methods)
    end
    return call(argument)
end


--- Body of `access_by_lua` of /nginx_status: the password that is set for it, or the admin token.
-- Without either nobody gets it, on no listener.
function _M.guard_status()
    local allowed, nobody = access.may_read_status()
    if allowed then
        return
    end
    if nobody then
        answer.refuse(403, "no_password", "nobody may read this as long as neither "
                      .. "TIDEGATE_STATUS_PASSWORD_FILE nor an admin token is set")
    else
        ngx.header["WWW-Authenticate"] = 'Basic realm="nginx_status"'
        answer.refuse(401, "unauthorized", "the password is missing or wrong")
    end
    return ngx.exit(ngx.HTTP_OK)
end


--- Answers for nginx where it refused a body for its size.
function _M.too_large()
    return answer.refuse(413, "too_large", "the body is larger than 64 MiB")
end


return _M
