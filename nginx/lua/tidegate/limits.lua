--- What a site may set for nginx as a whole: the connections of a worker, and how many workers.
--
-- Why: both stand outside of the http and stream parts, where the other files of a site go. Each
-- has a file with this one directive and nothing else. The directory of a site always has both: the
-- one that the site does not set refers to the environment's value, which entrypoint.sh writes to
-- the run directory at each start, so that it counts anew whatever was in force before.

local posix = require "tidegate.posix"

local find = string.find
local format = string.format
local match = string.match
local pairs = pairs
local tonumber = tonumber

local CONNECTIONS = "00-default.events"
local WORKERS = "00-default.main"
local OF_ENVIRONMENT = "/worker_connections.inc"

-- The ranges are those of the agent's settings. Nothing that nginx would take beyond them works: a
-- worker needs connections for itself, and what cannot be had is only found when none starts.
local LIMITS = {
    [CONNECTIONS] = {
        directive = "worker_connections", least = 128, most = 1048576,
        default = "include worker_connections.inc;\n",
    },
    [WORKERS] = {
        directive = "worker_processes", least = 1, most = 128, auto = true,
        default = "include worker_processes.inc;\n",
    },
}

local _M = {}


--- Whether a file of a site may have this name, for it sets one of the limits.
function _M.is_name(name)
    return LIMITS[name] ~= nil
end


--- What is wrong with the text of such a file; nil where nothing is.
function _M.fault(name, text)
    local limit = LIMITS[name]
    local value = match(text, "^" .. limit.directive .. " (%w+);\n$")
    local number = value and find(value, "^%d+$") and tonumber(value)
    if number and number >= limit.least and number <= limit.most
            or limit.auto and value == "auto" then
        return nil
    end
    return format("expected `%s N;` on a line, N from %d to %d%s, and nothing else",
                  limit.directive, limit.least, limit.most, limit.auto and " or auto" or "")
end


--- The files that a site's directory has to have besides its own, name to text.
function _M.defaults(files)
    local missing = {}
    for name, limit in pairs(LIMITS) do
        if not files[name] then
            missing[name] = limit.default
        end
    end
    return missing
end


--- Which of a site's files nginx means, though it names none; nil where it is none of these.
function _M.blamed(message, files)
    return files[CONNECTIONS] and find(message, "worker_connections are not enough", 1, true)
        and CONNECTIONS or nil
end


--- How many connections a worker has.
-- @param run the run directory
-- @param files those of the site, name to text
function _M.connections(run, files)
    local text = files[CONNECTIONS] or posix.read(run .. OF_ENVIRONMENT) or ""
    return tonumber(match(text, "^worker_connections (%d+);"))
end


return _M
